""".bin files: tensors in place, without torch; nothing in a pickle runs; what is damaged is one line."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_checkpoint
import small_pickle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_pickle import archive, malicious, rebuild, state_dict, storage, write_bin

from pocketllava import ConvertError
from pocketllava.convert import convert
from pocketllava.convert.pipeline import plan
from pocketllava.convert.read.torch_zip import read_pickled
from pocketllava.models.gguf_header import Header

SIX = np.arange(6, dtype=np.float32).tobytes()


def data_of(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes, from where read_pickled says they lie."""
    whole = path.read_bytes()
    return {t.name: whole[t.offset : t.offset + t.n_bytes] for t in read_pickled(path)}


def test_tensors_lie_where_they_are_said_to(tmp_path: Path) -> None:
    tensors = [("a", "F32", (2, 3), SIX), ("b", "BF16", (4,), b"12345678"), ("c", "I64", (1,), bytes(8))]
    path = write_bin(tmp_path / "pytorch_model.bin", tensors)
    assert data_of(path) == {name: data for name, _, _, data in tensors}
    assert [(t.dtype, t.shape) for t in read_pickled(path)] == [(d, s) for _, d, s, _ in tensors]


def test_tensors_that_share_a_storage(tmp_path: Path) -> None:
    store = storage("0", "F32", 6)
    entries = [
        ("tied", rebuild(store, (6,), (1,))),
        ("head", rebuild(store, (6,), (1,))),
        ("part", rebuild(store, (1, 2), (9, 1), 3)),
    ]
    path = archive(tmp_path / "pytorch_model.bin", state_dict(entries), {"0": SIX})
    assert data_of(path) == {"tied": SIX, "head": SIX, "part": SIX[12:20]}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_of_bin_files_gives_the_same_bundle(
    make_checkpoint: Any, make_bundle: Any, shards: int
) -> None:
    one, other = make_bundle(), make_bundle(weights="bin", shards=shards)
    for name in ("model.gguf", "mmproj.gguf"):
        tensors = [
            h.path.read_bytes()[h.data_start :] for h in (Header.read(b.folder / name) for b in (one, other))
        ]
        assert tensors[0] == tensors[1]
    sources = plan(make_checkpoint(weights="bin", shards=shards)).checkpoint.tensors.values()
    assert {t.file.suffix for t in sources} == {".bin"}


def test_safetensors_come_first(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(make_checkpoint(), tmp_path / "checkpoint")
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert {t.file.suffix for t in plan(folder).checkpoint.tensors.values()} == {".safetensors"}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_in_a_pickle_runs(tmp_path: Path, protocol: int) -> None:
    ran = tmp_path / "ran"
    path = archive(tmp_path / "pytorch_model.bin", malicious(f"echo > {ran}", protocol), {})
    with pytest.raises(ConvertError, match=rf"found (global {os.name}\.system|the pickle opcode)") as caught:
        read_pickled(path)
    assert "nothing of it was run" in str(caught.value)
    assert not ran.exists()


GLOBALS = (
    "builtins.eval",
    "torch.load",
    "torch._utils._rebuild_tensor",
    "collections.Counter",
    "torch.storage.UntypedStorage",
    "os.path.join",
)


@pytest.mark.parametrize("name", GLOBALS)
def test_every_other_global_is_refused_by_name(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    for mention in (
        f"c{module}\n{function}\n".encode(),
        b"\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(function)])
        + function.encode()
        + b"\x93",
    ):
        path = archive(tmp_path / "x.bin", b"\x80\x04" + mention + b")R.", {})
        with pytest.raises(ConvertError, match=f"found global {name}, expected"):
            read_pickled(path)


DICT = b"ccollections\nOrderedDict\n"
STORE = storage("0", "F32", 6)
PICKLES: dict[str, tuple[bytes, str]] = {
    "a list": (b"\x80\x02].", "found a pickled list, expected a state dict"),
    "a number in it": (state_dict([("n", small_pickle.number(3))]), "entry 'n' is a int, expected a tensor"),
    "a dict in it": (state_dict([("model", b"}")]), "entry 'model' is a dict"),
    "a name in it": (state_dict([("n", b"ctorch\nHalfStorage\n")]), "entry 'n' is a torch.HalfStorage"),
    "transposed": (state_dict([("w", rebuild(STORE, (3, 2), (1, 3)))]), r"strides \[1, 3\], expected contiguous"),
    "expanded": (state_dict([("w", rebuild(STORE, (9, 6), (0, 1)))]), r"strides \[0, 1\], expected contiguous"),
    "beyond its storage": (state_dict([("w", rebuild(STORE, (6,), (1,), 1))]), "goes beyond its storage"),
    "huge shape": (state_dict([("w", rebuild(STORE, (1 << 39,) * 8, (1,) * 8))]), "has strides|goes beyond"),
    "negative shape": (state_dict([("w", rebuild(STORE, (-6,), (1,)))]), "has no possible shape"),
    "negative offset": (state_dict([("w", rebuild(STORE, (6,), (1,), -1))]), "has no possible shape"),
    "another size": (state_dict([("w", rebuild(storage("0", "F32", 7), (6,), (1,)))]), "takes 24 bytes, expected 28"),
    "no such entry": (state_dict([("w", rebuild(storage("5", "F32", 6), (6,), (1,)))]), "no entry 'data/5'"),
    "a way out": (state_dict([("w", rebuild(storage("../version", "F32", 6), (6,), (1,)))]), "no entry 'data/../version'"),
    "build on a name": (b"\x80\x02" + DICT + b"}b.", "fills something that is no dict"),
    "call of a dict": (b"\x80\x02})R.", "calls something that is no name"),
    "call of a storage": (b"\x80\x02ctorch\nFloatStorage\n(I5\ntR.", "the pickle opcode INT"),
    "constructor": (b"\x80\x02ctorch\nFloatStorage\n)R.", "found torch.FloatStorage with unknown arguments"),
    "OrderedDict of pairs": (b"\x80\x02" + DICT + b"]\x85R.", "OrderedDict with unknown arguments"),
    "instance": (b"\x80\x02(ios\nsystem\n.", "the pickle opcode INST"),
    "odd escape": (b"S'\\z'\n.", "found the pickle opcode STRING"),  # decoding it is a DeprecationWarning
    "new object": (b"\x80\x02" + DICT + b")\x81.", "the pickle opcode NEWOBJ"),
    "extension": (b"\x80\x02\x82\x01.", "the pickle opcode EXT1"),
    "persistent text": (b"\x80\x02Pstorage\n.", "the pickle opcode PERSID"),
    "persistent number": (b"\x80\x02K\x01Q.", "described in an unknown way"),
    "nested key": (b"\x80\x02})" + b"2\x86" * 200 + b"K\x01s.", "opcode DUP"),
    "key of tuples": (b"\x80\x02})q\x01" + b"h\x01h\x01\x86q\x01" * 200 + b"K\x01s.", "neither text nor a number"),
    "huge memo": (b"\x80\x02}r\xff\xff\xff\xff.", ""),
    "huge text": (b"\x80\x02X\xff\xff\xff\xff.", "a damaged pickle"),
    "huge bytes": (b"\x80\x05\x8e" + b"\xff" * 8 + b".", "a damaged pickle"),
    "empty": (b"", "a damaged pickle|without STOP"),
    "no stop": (b"\x80\x02}", "a damaged pickle|without STOP"),
    "takes too much": (b"\x80\x02}\x87.", "takes more than it put"),
    "no mark": (b"\x80\x02}u.", "a mark that it never set"),
    "no memo": (b"\x80\x02h\x07.", "a damaged pickle"),
    "odd items": (b"\x80\x02}(K\x01u.", "a damaged pickle"),
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
def test_odd_pickles_are_one_line(tmp_path: Path, case: str) -> None:
    pickled, message = PICKLES[case]
    path = archive(tmp_path / "pytorch_model.bin", pickled, {"0": SIX})
    if not message:
        assert read_pickled(path) == []
        return
    with pytest.raises(ConvertError, match=message) as caught:
        read_pickled(path)
    assert "\n" not in str(caught.value)


ONES = b"(" + b"K\x01" * 200_000 + b"tq\x02"  # a tuple of 200,000 numbers, in the memo
BOMBS = {
    "MEMOIZE": b"}" + b"\x94" * (12 << 20),
    "LONG_BINPUT": b"}" + b"".join(b"r" + struct.pack("<I", n) for n in range(1 << 20)),
    "EMPTY_DICT": b"}" * (15 << 20),
    "TUPLE1": b"}" + b"\x85" * (15 << 20),
    "four bytes a character": b"}X" + struct.pack("<I", 15 << 20) + b"a" * ((15 << 20) - 4) + "🙂".encode(),
    "arguments again and again": ONES + b"ctorch._utils\n_rebuild_parameter\nq\x01" + b"h\x01h\x02R" * 100_000,
    "a shape again and again": ONES + STORE + b"q\x01" + b"ctorch._utils\n_rebuild_tensor_v2\n(h\x01K\x00h\x02h\x02tR" * 50_000,
}  # fmt: skip
BOMBED = """
import re, sys, time
from pathlib import Path
from pocketllava import ConvertError
from pocketllava.convert.read.torch_zip import read_pickled

for path in map(Path, sys.argv[1:]):
    start = time.process_time()
    try:
        print("no error", read_pickled(path))
    except ConvertError as error:
        print(error)
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    print(time.process_time() - start, peak[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_bombs_take_little_memory_and_time(tmp_path: Path) -> None:
    """12 MB of MEMOIZE once took 1.5 GB."""
    paths = [
        archive(tmp_path / f"{name}.bin", b"\x80\x04" + bomb + b".", {"0": SIX})
        for name, bomb in BOMBS.items()
    ]
    done = subprocess.run([sys.executable, "-c", BOMBED, *map(str, paths)], capture_output=True, text=True, check=True)  # fmt: skip
    lines = done.stdout.splitlines()
    for path, message, figures in zip(paths, lines[::2], lines[1::2], strict=True):
        seconds, kilobytes = map(float, figures.split())
        assert message.startswith(f"{path}: "), message
        assert kilobytes < 250_000, path
        assert seconds < 5, path


def change(at: bytes, instead: bytes) -> Any:
    """Put other bytes in a file's place where `at` first stands."""
    return lambda data: data.replace(at, instead, 1)


def overlapping(data: bytes) -> bytes:
    """The directory's entry for data/1 points at data/0."""
    first, second = (data.rindex(b"archive/data/" + key) - 46 for key in (b"0", b"1"))
    return data[: second + 42] + data[first + 42 : first + 46] + data[second + 46 :]


FILES: dict[str, tuple[Any, str]] = {
    "old format": (lambda d: b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + d, "format from before 1.6, .* save it again"),
    "no zip": (lambda d: b"hello", "no zip archive, expected the zip format"),
    "empty": (lambda d: b"", "no zip archive"),
    "lfs": (lambda d: b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
    "cut": (lambda d: d[:-30], "not a whole zip archive"),
    "no head": (lambda d: d[400:], "no zip archive|does not lie where|not a whole"),
    "overlap": (overlapping, "overlaps the one before it"),
    "no pickle": (lambda d: d.replace(b"data.pkl", b"data.abc"), "0 data.pkl, expected one"),
    "two of one name": (lambda d: d.replace(b"archive/data/1", b"archive/data/0"), "entries of"),
    "big-endian": (lambda d: d.replace(b"little", b"bigbig"), "byte order b'bigbig'"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_damaged_archives_are_one_line(tmp_path: Path, case: str) -> None:
    spoil, message = FILES[case]
    path = write_bin(tmp_path / "pytorch_model.bin", [("a", "F32", (6,), SIX), ("b", "F32", (6,), SIX)])
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ConvertError, match=message) as caught:
        read_pickled(path)
    assert "\n" not in str(caught.value)


def test_compressed_entries(tmp_path: Path) -> None:
    store = rebuild(storage("0", "F32", 1000), (1000,), (1,))
    path = archive(tmp_path / "x.bin", state_dict([("a", store)]), {"0": bytes(4000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ConvertError, match="is compressed or encrypted, expected a stored one"):
        read_pickled(path)


def test_the_whole_command_refuses_a_trojan(make_checkpoint: Any, tmp_path: Path) -> None:
    folder, ran = shutil.copytree(make_checkpoint(), tmp_path / "checkpoint"), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    archive(folder / "pytorch_model.bin", malicious(f"echo > {ran}"), {})
    with pytest.raises(ConvertError, match=rf"pytorch_model.bin: found global {os.name}\.system"):
        convert(folder, tmp_path / "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.skipif(os.name == "nt", reason="Windows would write the 5 GB")
def test_only_the_directory_and_the_pickle_are_read(tmp_path: Path) -> None:
    """A sparse file of 5 GB with one tensor in it opens at once (zip64 sizes, as torch writes them)."""
    n = 5 << 30
    path = tmp_path / "pytorch_model.bin"
    pickled = state_dict([("a", rebuild(storage("0", "F16", n // 2), (n // 2,), (1,)))])
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        info = zipfile.ZipInfo("archive/data/0")
        info.CRC, info.header_offset = 0, file.fp.tell()  # type: ignore[union-attr]
        info.file_size = info.compress_size = n
        file.fp.write(info.FileHeader(zip64=True))  # type: ignore[union-attr]
        file.fp.seek(n, 1)  # type: ignore[union-attr]
        file.start_dir = file.fp.tell()  # type: ignore[attr-defined, union-attr]
        file.filelist.append(info)
        file.NameToInfo[info.filename] = info
        file._didModify = True  # type: ignore[attr-defined]
    assert path.stat().st_size > n
    (tensor,) = read_pickled(path)
    assert tensor.n_bytes == n


@pytest.mark.skipif(os.name == "nt", reason="Windows would write the 2 GB")
def test_a_directory_larger_than_any_checkpoint_needs_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(2 << 30)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, (2 << 30) - 4, 4, 0))
    with pytest.raises(ConvertError, match=r"a directory of 2147483644 bytes, expected at most"):
        read_pickled(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes(tmp_path: Path, data: st.DataObject) -> None:
    """Any file either gives tensors inside itself, or is a ConvertError of one line."""
    path = write_bin(tmp_path / "x.bin", [("a", "F32", (2, 3), SIX), ("b", "F16", (4,), b"12345678")])
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(whole) - 1))
        instead = data.draw(st.binary(max_size=5) | st.sampled_from([struct.pack("<I", 1 << 31), b"(", b"."]))
        whole[at : at + data.draw(st.integers(0, 5))] = instead
    path.write_bytes(whole[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))])
    try:
        for tensor in read_pickled(path):
            assert tensor.offset + tensor.n_bytes <= path.stat().st_size
    except ConvertError as error:
        assert "\n" not in str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pickled=st.lists(st.sampled_from([b"}", b"]", b"(", b"t", b"u", b"s", b"b", b"R", b"Q", b"a", b"e", b"K\x01", b"q\x01", b"h\x01", b"0", b"\x85", b"\x86", b"\x93", b"N", small_pickle.text("storage"), DICT, STORE, rebuild(STORE, (6,), (1,))]), max_size=40))  # fmt: skip
def test_pickles_of_any_opcodes(tmp_path: Path, pickled: list[bytes]) -> None:
    path = archive(tmp_path / "x.bin", b"\x80\x02" + b"".join(pickled) + b".", {"0": SIX})
    try:
        assert all(t.n_bytes == 24 for t in read_pickled(path))
    except ConvertError as error:
        assert "\n" not in str(error)


@pytest.mark.reference
def test_files_that_torch_wrote(make_checkpoint: Any, tmp_path: Path) -> None:
    import torch

    tied = torch.randn(7, 5)
    state = {
        "f32": torch.randn(3, 4), "f16": torch.randn(5).half(), "bf16": torch.randn(2, 2, 3).bfloat16(),
        "parameter": torch.nn.Parameter(torch.randn(4)), "ids": torch.arange(9), "tied": tied, "head": tied,
        "part": tied[2:4], "row": tied[3], "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3),
    }  # fmt: skip
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    found = data_of(path)
    for name, tensor in state.items():
        assert (
            found[name]
            == tensor.detach()
            .contiguous()
            .view(torch.uint8 if tensor.ndim else tensor.dtype)
            .numpy()
            .tobytes()
        ), name
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).half()
    for protocol in (2, 3, 4, 5):
        torch.save(module.state_dict(), path, pickle_protocol=protocol)
        assert data_of(path) == {n: t.numpy().tobytes() for n, t in module.state_dict().items()}
    torch.save({"w": torch.randn(3, 4).T}, path)
    with pytest.raises(ConvertError, match=r"strides \[1, 4\]"):
        read_pickled(path)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ConvertError, match=r"format from before 1\.6"):
        read_pickled(path)


@pytest.mark.reference
def test_torch_loads_what_the_tests_write(make_checkpoint: Any) -> None:
    """small_pickle.py writes what torch writes: torch's own restricted loader agrees."""
    import torch

    folder = make_checkpoint(weights="bin")
    found = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name, array in small_checkpoint.values(small_checkpoint.Layout()):
        assert found[name].numpy().tobytes() == small_checkpoint.to_bytes(array, "F16"), name

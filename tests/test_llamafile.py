"""llamafiles: a program with GGUF files behind it, asked where they lie; extracted where that cannot be."""

from __future__ import annotations

import os
import random
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_repair import hub_file

from pocketllava import Bundle, BundleError, InputError, Llava
from pocketllava.cli import cli
from pocketllava.convert import requantize
from pocketllava.convert.llamafile import gguf_parts
from pocketllava.measure.feature_drift import features_move
from pocketllava.models.bundle import MMPROJ, MODEL
from pocketllava.models.gguf_header import Header, Part
from pocketllava.models.store import VARIABLE, Store
from pocketllava.names import open_bundle

PHOTO = str(Path(__file__).parent / "photo.jpg")
posix = pytest.mark.skipif(os.name != "posix", reason="libllama's FILE is another C library's")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder and a store of this test's own."""
    folder = tmp_path / "cache"
    for module in ("foreign", "llamafile"):
        monkeypatch.setattr(f"pocketllava.convert.{module}.cache_folder", lambda: folder)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    return folder


@pytest.fixture
def files(bundle: Bundle, tmp_path: Path) -> tuple[Path, Path]:
    """A text model and its mmproj, as Mozilla's llamafile names them."""
    folder = tmp_path / "files"
    folder.mkdir()
    model = Path(shutil.copy(bundle.model, folder / "llava-v1.5-7b-Q4_K.gguf"))
    return model, hub_file(bundle.mmproj, folder / "llava-v1.5-7b-mmproj-Q4_0.gguf")


def packed(
    path: Path, *files: Path, method: int = zipfile.ZIP_STORED, before: str = "", align: int = 64
) -> Path:
    """A program, then a ZIP archive; each file begins `align` bytes after a multiple of twice as much."""
    path.write_bytes(b"MZqFpD=" + b"program" * 100)
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr(".args", "-m")
        for file in files:
            info = zipfile.ZipInfo(before + file.name)
            info.compress_type = method
            at = archive.fp.tell() + 30 + len(info.filename) + 4  # type: ignore[union-attr]
            n = (align - at) % (2 * align)
            info.extra = struct.pack("<HH", 0xD935, n) + b"\0" * n
            archive.writestr(info, file.read_bytes())
    return path


@posix
def test_a_llamafile_is_asked_where_it_lies(
    files: tuple[Path, Path], bundle: Bundle, llava: Llava, tmp_path: Path, cache: Path
) -> None:
    whole = packed(tmp_path / "llava-v1.5-7b-q4.llamafile", *files)
    own = llava.bundle.manifest
    for weights in ("mapped", "memory"):
        options = {"template": "llava-hf", "pad": own.preprocessing.pad_to_square, "weights": weights}
        with Llava.load(whole, **options) as theirs:
            assert theirs.bundle.model == whole
            answers = [each.ask(PHOTO, "What is it?", max_tokens=12).token_ids for each in (theirs, llava)]
        assert answers[0] == answers[1]
    assert sorted(path.name for path in cache.rglob("*.gguf")) == [theirs.bundle.mmproj.name]
    assert features_move(theirs.bundle.mmproj, bundle.mmproj) == 0.0
    assert os.name != "posix" or theirs.bundle.mmproj.stat().st_mode & 0o111 == 0
    with Llava.load(whole, isolated=True) as apart:
        assert apart.ask(PHOTO, "What is it?", max_tokens=3).text


@posix
def test_a_llamafile_is_imported_by_reference(
    files: tuple[Path, Path], bundle: Bundle, tmp_path: Path
) -> None:
    whole = packed(tmp_path / "llava.llamafile", *files)
    done = CliRunner().invoke(cli, ["import", str(whole), "--as", "mine"])
    assert done.exit_code == 0, done.output
    assert "llava-v1.5-7b-Q4_K.gguf: a LLaVA-1.5 with llava-v1.5-7b-mmproj-Q4_0.gguf" in done.stderr
    made = Bundle.open(Store.default().folder("mine"))
    assert made.manifest.references[MODEL].start % 32 == 0
    assert sorted(path.name for path in made.folder.iterdir()) == ["bundle.json", MMPROJ]
    made.check_hashes()
    (quantized,) = requantize(made, {tmp_path / "q8": "Q8_0"})
    (same,) = requantize(bundle, {tmp_path / "same": "Q8_0"})
    assert quantized.model.read_bytes() == same.model.read_bytes()
    whole.write_bytes(whole.read_bytes()[: made.manifest.references[MODEL].start + 999])
    with pytest.raises(BundleError, match=r"llava\.llamafile: found \d+ bytes, expected \d+; put it back"):
        Bundle.open(made.folder)


@posix
def test_a_copy_of_a_llamafiles_model_stands_alone(files: tuple[Path, Path], tmp_path: Path) -> None:
    whole = packed(tmp_path / "llava.llamafile", *files)
    done = CliRunner().invoke(cli, ["import", str(whole), "--as", "mine", "--copy"])
    assert done.exit_code == 0, done.output
    whole.unlink()
    made = Bundle.open(Store.default().folder("mine"))
    assert made.model.read_bytes() == files[0].read_bytes()
    made.check_hashes()


@posix
def test_parts_are_read_as_the_files_are(files: tuple[Path, Path], tmp_path: Path) -> None:
    whole = packed(tmp_path / "llava.llamafile", *files)
    for part, file in zip(gguf_parts(whole), files, strict=True):
        assert isinstance(part, Part)
        inner, outer = Header.read(part), Header.read(file)
        assert (inner.keys, inner.tensors, inner.header_bytes) == (
            outer.keys,
            outer.tensors,
            outer.data_start,
        )
        assert inner.data_start == outer.data_start + part.start
        with pytest.raises(BundleError, match=r"llava\.llamafile: found \d+ bytes, expected \d+"):
            Header.read(Part(whole, part.start, 1 << 40, "x"))


def test_files_that_are_not_aligned_are_extracted_once(
    files: tuple[Path, Path], tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = packed(tmp_path / "llava.llamafile", *files, before="../../", align=4)
    for _ in range(2):
        opened = open_bundle(whole)
        assert opened.model.read_bytes() == files[0].read_bytes()
        assert cache / "llamafiles" in opened.model.parents
    assert caplog.text.count("llava.llamafile: its files are extracted once, which takes 0.0") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "files", "llava.llamafile"]
    done = CliRunner().invoke(cli, ["import", str(whole), "--as", "mine"])
    assert done.exit_code == 0, done.output
    shutil.rmtree(cache)  # what the store has is its own
    assert Bundle.open(Store.default().folder("mine")).model.read_bytes() == files[0].read_bytes()


def test_what_is_no_llamafile_or_a_damaged_one_is_refused(
    files: tuple[Path, Path], tmp_path: Path, cache: Path
) -> None:
    pressed = packed(tmp_path / "pressed.llamafile", *files, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(BundleError, match="is not stored as it is"):
        open_bundle(pressed)
    with pytest.raises(BundleError, match="a ZIP archive with 0 GGUF files"):
        open_bundle(packed(tmp_path / "empty.llamafile"))
    other = Path(shutil.copy(files[0], tmp_path / "other.gguf"))
    two = packed(tmp_path / "two.llamafile", *files, other)
    with pytest.raises(InputError, match="found 2 text models"):
        open_bundle(two)
    whole = packed(tmp_path / "llava.llamafile", *files, align=4)
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.llamafile").write_bytes(data)
    with pytest.raises(BundleError, match=r"cannot be extracted .*; download it again"):
        open_bundle(tmp_path / "bad.llamafile")
    assert len(list(cache.rglob("*.partial"))) == 0


def test_a_damaged_list_of_files_is_refused_in_one_line(files: tuple[Path, Path], tmp_path: Path) -> None:
    data = packed(tmp_path / "llava.llamafile", *files).read_bytes()
    listed, rng = data.rindex(b"PK\x01\x02", 0, data.rindex(b"PK\x01\x02")), random.Random(5)
    damaged, refused = tmp_path / "damaged.llamafile", 0
    for _ in range(80):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(listed, len(data))] = rng.randrange(256)
        damaged.write_bytes(changed)
        try:
            for part in gguf_parts(damaged):
                Header.read(part)
        except BundleError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 10

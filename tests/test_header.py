"""GGUF headers: what is whole is read, what is damaged is one line, and llama.cpp never sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf import GGUFValueType as V
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketllava import Bundle, BundleError
from pocketllava.models.gguf_header import Header
from pocketllava.models.gguf_writer import Key, header_bytes, stored_keys, write_floats
from pocketllava.models.mmproj_contract import check_mmproj


def test_it_reads_what_ggufs_reader_reads(bundle: Bundle) -> None:
    for path in (bundle.model, bundle.mmproj):
        header, reader = Header.read(path), GGUFReader(path)
        assert [
            (t.name, t.shape[::-1], t.type, t.n_bytes, header.data_start + t.offset) for t in header.tensors.values()
        ] == [
            (t.name, tuple(map(int, t.shape)), int(t.tensor_type), t.n_bytes, t.data_offset) for t in reader.tensors
        ]  # fmt: skip
        for name, value in header.keys.items():
            assert reader.fields[name].contents() == value


def test_a_header_is_written_again_as_it_was(bundle: Bundle) -> None:
    for header in (bundle.model_header, bundle.mmproj_header):
        keys, architecture = stored_keys(header), header.keys["general.architecture"]
        again = header_bytes(architecture, keys, header.tensors.values())
        assert again == header.path.read_bytes()[: header.data_start]


def test_the_converters_mmproj_passes_the_check(bundle: Bundle) -> None:
    info = check_mmproj(Header.read(bundle.mmproj))
    assert info.tiling is None
    assert info.n_patches == bundle.image_tokens == 576
    assert (info.n_patches, info.n_blocks, info.vision_width, info.projected_width) == (576, 2, 64, 256)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_are_one_line(bundle: Bundle, tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(bundle.mmproj.read_bytes())
    start = Header.read(bundle.mmproj).data_start
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, start - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([len(whole), start]) | st.integers(0, len(whole)))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole[:end])
    try:
        check_mmproj(Header.read(path))
    except BundleError as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes that do not begin with GGUF"),
        (b"GGML" + bytes(40), "44 bytes that do not begin with GGUF"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(40), "version 9, expected 2 or 3"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, "18446744073709551615 tensors"),
    ],
)
def test_files_that_are_no_gguf(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=message):
        Header.read(path)


def edited(bundle: Bundle, path: Path, **changes: Any) -> Header:
    """The mmproj's header with other keys or without a tensor."""
    header = Header.read(bundle.mmproj)
    keys, types, tensors = dict(header.keys), dict(header.key_types), dict(header.tensors)
    for name, value in changes.pop("keys", {}).items():
        if value is None:
            del keys[name]
        else:
            keys[name] = value
    types |= changes.pop("types", {})
    for name in changes.pop("drop", ()):
        del tensors[name]
    return Header(path, keys, types, tensors, header.data_start, header.file_bytes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ["mm.2.bias"]}, "tensor 'mm.2.bias' is missing"),
        ({"drop": ["v.class_embd"]}, "tensor 'v.class_embd' is missing"),
        ({"keys": {"clip.vision.patch_size": 28}}, "tensor 'v.patch_embd.weight' has shape"),
        ({"keys": {"clip.vision.image_size": None}}, "key clip.vision.image_size is None"),
        (
            {"types": {"clip.vision.image_size": 5}},
            "clip.vision.image_size is 336, expected a positive 32-bit",
        ),
        ({"keys": {"clip.projector_type": "ldp"}}, "key clip.projector_type is 'ldp', expected 'mlp'"),
        ({"keys": {"clip.vision.feature_layer": [9]}}, r"feature_layer \[9\], expected one layer of 2"),
        ({"keys": {"clip.vision.block_count": 3}}, r"tensor 'v.blk.2.attn_k.bias' is missing"),
        ({"keys": {"clip.vision.image_mean": [1.0]}}, "expected 3 floats"),
    ],
)
def test_mmproj_files_that_libmtmd_would_misread(
    bundle: Bundle, tmp_path: Path, changes: Any, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        check_mmproj(edited(bundle, tmp_path / "edited.gguf", **dict(changes)))


def test_a_published_file_that_runs_one_block_short(bundle: Bundle, tmp_path: Path) -> None:
    keys = {"clip.vision.feature_layer": None, "clip.vision.block_count": 23}
    with pytest.raises(BundleError, match="would run 22 of its 23 blocks"):
        check_mmproj(edited(bundle, tmp_path / "published.gguf", keys=keys))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES: list[tuple[V, Any]] = [
    (V.UINT32, st.integers(0, 2**32 - 1)),
    (V.INT64, st.integers(-(2**63), 2**63 - 1)),
    (V.FLOAT32, st.floats(width=32, allow_nan=False)),
    (V.BOOL, st.booleans()),
    (V.STRING, TEXTS),
]
SCALAR_KEYS = [st.tuples(st.just(kind), st.none(), values) for kind, values in VALUES]
ARRAY_KEYS = [
    st.tuples(st.just(V.ARRAY), st.just(kind), st.lists(values, min_size=1, max_size=5))
    for kind, values in VALUES
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.dictionaries(
        TEXTS.filter(lambda name: not name.startswith("general.")), st.one_of(*SCALAR_KEYS, *ARRAY_KEYS)
    ),
    shapes=st.dictionaries(TEXTS, st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), max_size=4),
)
def test_what_is_written_is_read_back(tmp_path: Path, keys: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    listed = [Key(name, value, kind, item) for name, (kind, item, value) in keys.items()]
    arrays = {name: np.full(shape, n, np.float32) for n, (name, shape) in enumerate(shapes.items())}
    path = write_floats(tmp_path / "x.gguf", "llama", listed, arrays)
    header, data = Header.read(path), path.read_bytes()
    assert header.keys.pop("general.architecture") == "llama"
    assert stored_keys(header) == listed
    assert list(header.tensors) == list(arrays)
    for name, array in arrays.items():
        info = header.tensors[name]
        start = header.data_start + info.offset
        assert info.shape == array.shape
        assert data[start : start + info.n_bytes] == array.tobytes()
    assert header_bytes("llama", stored_keys(header), header.tensors.values()) == data[: header.data_start]

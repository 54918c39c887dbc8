"""Every text type, byte for byte what llama.cpp's own two steps give: an F16 file, then llama_model_quantize."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import quants
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pocketllava.convert.pipeline import plan
from pocketllava.convert.plan.quantize import (
    ERROR_BOUNDS,
    MMPROJ_TYPES,
    NEED_MATRIX,
    TEXT_TYPES,
    dequantize,
    known,
    quantize,
)
from pocketllava.convert.read.source_reader import SourceReader
from pocketllava.convert.write.writer import write
from pocketllava.errors import ConvertError, UnsupportedOption
from pocketllava.llamacpp.log import capture_log
from pocketllava.models.gguf_header import Header

QUANTS = sorted(set(TEXT_TYPES) - set(NEED_MATRIX))  # the others: test_imatrix.py
DEEP = {"layers": 16, "ffn": 256}
LAYOUTS: dict[str, dict[str, Any]] = {
    "grouped queries": {"layers": 1, "ffn": 256, "kv_heads": 1},
    "tied embeddings": {"layers": 1, "ffn": 256, "tied": True},
    "rows of 288": {"layers": 1, "ffn": 288},
    "rows of 272": {"layers": 1, "ffn": 272},
}
MIXES = [quant for quant in QUANTS if quant.endswith(("_S", "_M", "_L", "Q2_K", "Q4_0", "Q5_0"))]


def model_file(checkpoint: Path, quant: str, path: Path) -> Header:
    """The text model as the converter writes it, without the rest of a conversion."""
    with SourceReader() as reader:
        write(plan(checkpoint, quant=quant).text, path, reader, 2, lambda n: None)
    return Header.read(path)


def llama_quantize(source: Path, quant: str, path: Path) -> Header:
    """llama.cpp's own quantizer."""
    from llama_cpp import llama_cpp

    capture_log()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(TEXT_TYPES[quant][1]), 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)) == 0
    return Header.read(path)


def tensor_bytes(header: Header, name: str) -> bytes:
    """A tensor's data."""
    info = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(header.data_start + info.offset)
        return file.read(info.n_bytes)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_bytes_equal_llama_model_quantize(
    make_checkpoint: Any, tmp_path: Path, layout: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(**layout)
    half = model_file(checkpoint, "F16", tmp_path / "f16.gguf")
    for quant in QUANTS:
        converted = model_file(checkpoint, quant, tmp_path / "converted.gguf")
        expected = llama_quantize(half.path, quant, tmp_path / "expected.gguf")
        types = [(name, T(t.type).name, t.shape) for name, t in converted.tensors.items()]
        assert types == [(name, T(t.type).name, t.shape) for name, t in expected.tensors.items()], quant
        for name in converted.tensors:
            assert tensor_bytes(converted, name) == tensor_bytes(expected, name), (quant, name)


def test_mixes_by_layer_equal_llama_model_quantize(make_checkpoint: Any, tmp_path: Path) -> None:
    """Which layers get more bits, a deep model shows; every type's bytes are compared on shallow ones."""
    checkpoint = make_checkpoint(**DEEP)
    half = model_file(checkpoint, "F16", tmp_path / "f16.gguf")
    for quant in MIXES:
        expected = llama_quantize(half.path, quant, tmp_path / "expected.gguf")
        types = {name: T(t.type).name for name, t in expected.tensors.items()}
        assert planned_types(checkpoint, quant) == types, quant


def planned_types(checkpoint: Path, quant: str, matrix: Path | None = None) -> dict[str, str]:
    """The types that the converter will write, by tensor."""
    return {t.name: t.type.name for t in plan(checkpoint, quant=quant, imatrix=matrix).text.tensors}


def test_keys_equal_llama_model_quantize(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(layers=2, ffn=256)
    half = model_file(checkpoint, "F16", tmp_path / "f16.gguf")
    converted = model_file(checkpoint, "Q4_K_M", tmp_path / "converted.gguf")
    expected = llama_quantize(half.path, "Q4_K_M", tmp_path / "expected.gguf")
    assert converted.keys == expected.keys
    assert converted.key_types == expected.key_types


# A block's scale is F16, whose smallest step is 2^-24: half of it, times Q6_K's largest multipliers (127 and 32).
LOST_WITH_THE_SCALE = 2**-25 * 127 * 32


@example(rows=np.full((4, 256), 1e-5, np.float32) * (np.arange(256) == 0).astype(np.float32), kind=T.Q4_K)
@given(
    rows=hnp.arrays(np.float32, (4, 256), elements=st.floats(-100, 100, width=32)),
    kind=st.sampled_from(
        sorted({t for n, (t, _) in TEXT_TYPES.items() if n not in NEED_MATRIX} | {T.Q5_0, T.Q5_1})
    ),
)
def test_what_is_quantized_reads_back(rows: Any, kind: T) -> None:
    data = quantize(rows, kind, "rows")
    back = dequantize(data, kind, rows.size).reshape(rows.shape)
    assert np.isfinite(back).all()
    largest = np.abs(rows).max(initial=0.0)
    assert np.abs(back - rows).max() <= 0.6 * largest + LOST_WITH_THE_SCALE
    if kind in (T.F32, T.F16, T.BF16):
        assert np.abs(back - rows).max() <= ERROR_BOUNDS[kind] * largest + 1e-7


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_K])
def test_values_that_are_no_numbers_are_refused(value: float, kind: T) -> None:
    rows = np.zeros((2, 256), np.float32)
    rows[1, 200] = value
    with pytest.raises(ConvertError, match=r"tensor w: holds NaN or infinite"):
        quantize(rows, kind, "w")


def test_values_beyond_f16_are_refused() -> None:
    with pytest.raises(ConvertError, match=r"holds 1e\+06, F16 ends at 65504; use BF16 or F32"):
        quantize(np.full((1, 32), 1e6, np.float32), T.F16, "w")


# Below 1e-30 a block's inverse scale overflows float32, and both take what infinity becomes as an integer.
FINITE = st.floats(
    width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**22), max_value=2.0**22
).map(lambda value: 0.0 if abs(value) < 1e-30 else value)
HALVES = st.integers(-254, 254).map(lambda n: n / 2)  # with 127 among them, what lies between two integers


@given(st.sampled_from([FINITE, HALVES]).flatmap(lambda v: hnp.arrays(np.float32, (3, 64), elements=v)))
def test_q8_0_is_ggufs_bit_for_bit(rows: Any) -> None:
    rows[0, 0] = 127
    assert quantize(rows, T.Q8_0, "x") == quants.quantize(rows, T.Q8_0).tobytes()


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e-7, 1.0, 1e4])
def test_q8_0_of_every_size(scale: float) -> None:
    rows = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32) * np.float32(scale)
    for values in (rows, rows.astype(np.float16).astype(np.float32)):
        values[np.isinf(values)] = 0
        assert quantize(values, T.Q8_0, "x") == quants.quantize(values, T.Q8_0).tobytes()


def test_every_f16_value_is_read_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert dequantize(finite.tobytes(), T.F16, finite.size).tobytes() == finite.astype(np.float32).tobytes()


def test_types_are_known_by_name() -> None:
    assert known("q4_k_m", TEXT_TYPES, "--quant") == "Q4_K_M"
    with pytest.raises(
        UnsupportedOption, match=r"--mmproj: found 'Q4_0', expected one of F32, F16, BF16, Q8_0"
    ):
        known("Q4_0", MMPROJ_TYPES, "--mmproj")

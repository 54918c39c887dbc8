"""Importance matrices: files read, quantization with one byte for byte llama.cpp's, sums equal llama.cpp's tool's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack.gguf_mutants import File
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader
from test_quantize import planned_types, tensor_bytes

from pocketllava import BackendError, Bundle, ConvertError, InputError, Llava, UnsupportedOption
from pocketllava.convert.pipeline import convert, plan
from pocketllava.convert.plan.importance import read_matrix
from pocketllava.convert.plan.quantize import NEED_MATRIX, TEXT_TYPES, quantize
from pocketllava.convert.read.source_reader import SourceReader
from pocketllava.convert.write.writer import write
from pocketllava.llamacpp import tensors
from pocketllava.llamacpp.tensors import mul_mat_op
from pocketllava.measure.activations import Activations
from pocketllava.measure.importance import collect, write_matrix
from pocketllava.models.gguf_header import Header

# Types where their mix depends on heads or on row lengths; all eight that need a matrix, and others.
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one block": (
        {"layers": 1, "ffn": 256},
        ("Q8_0", "Q6_K", "Q4_K_M", "Q3_K_S", "Q2_K", "Q4_1", "Q4_0", "Q5_0", "IQ4_XS"),
    ),
    "grouped queries": (
        {"layers": 1, "ffn": 256, "kv_heads": 1, "tied": True},
        ("IQ2_XXS", "IQ3_XXS", "IQ3_S", "IQ4_NL"),
    ),
    "tied embeddings": ({"layers": 1, "ffn": 256, "tied": True}, ("IQ2_S", "IQ3_XS", "Q4_K_M")),
    "rows of 288": ({"layers": 1, "ffn": 288}, ("IQ2_XXS", "IQ2_M", "IQ3_XXS", "IQ3_S")),
    "rows of 272": ({"layers": 1, "ffn": 272, "tied": True}, ("IQ2_XS", "IQ3_M")),
}
DEEP = {"layers": 8, "ffn": 256, "kv_heads": 2, "tied": True}
MIXES = ("Q4_0", "Q5_0", "IQ4_XS", "IQ3_XS", "IQ3_M")
TOOLS = Path("/tmp/src/build/bin")


def model_file(checkpoint: Path, quant: str, path: Path, matrix: Path | None = None) -> Header:
    """The text model as the converter writes it, without the rest of a conversion."""
    with SourceReader() as reader:
        write(plan(checkpoint, quant=quant, imatrix=matrix).text, path, reader, 2, lambda n: None)
    return Header.read(path)


def made_up(half: Header, path: Path, **changes: Any) -> Path:
    """A matrix of skewed random sums for every matrix but the token embedding."""
    rng = np.random.default_rng(7)
    sums = {
        name: (np.exp(3 * rng.standard_normal(t.shape[1])) * 100, 100)
        for name, t in half.tensors.items()
        if len(t.shape) == 2 and not name.startswith("token_embd")
    }
    return write_matrix(path, {**sums, **changes}, ["made up"], 2, 512)


def llama_quantize(source: Path, quant: str, path: Path, matrix: Path) -> Header:
    """llama.cpp's own quantizer with the same matrix, read by our own reader."""
    from llama_cpp import llama_cpp

    read = read_matrix(matrix, quant)
    assert read
    pointer = ctypes.POINTER(ctypes.c_float)
    rows = [(n.encode(), v.ctypes.data_as(pointer), v.size) for n, v in read.values.items()]
    data = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))(*rows, (None, None, 0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.imatrix = int(TEXT_TYPES[quant][1]), 2, data
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)) == 0
    return Header.read(path)


def same(converted: Header, expected: Header, quant: str) -> None:
    """Types, shapes and every byte."""
    types = [(name, T(t.type).name, t.shape) for name, t in converted.tensors.items()]
    assert types == [(name, T(t.type).name, t.shape) for name, t in expected.tensors.items()], quant
    for name in converted.tensors:
        assert tensor_bytes(converted, name) == tensor_bytes(expected, name), (quant, name)


@pytest.mark.parametrize(("layout", "quants"), CASES.values(), ids=list(CASES))
def test_bytes_equal_llama_cpps_with_a_matrix(
    make_checkpoint: Any, tmp_path: Path, layout: dict[str, Any], quants: tuple[str, ...]
) -> None:
    checkpoint = make_checkpoint(**layout)
    half = model_file(checkpoint, "F16", tmp_path / "f16.gguf")
    matrix = made_up(half, tmp_path / "m.gguf")
    for quant in quants:
        converted = model_file(checkpoint, quant, tmp_path / "converted.gguf", matrix)
        same(converted, llama_quantize(half.path, quant, tmp_path / "expected.gguf", matrix), quant)


def test_mixes_by_layer_equal_llama_cpps_with_a_matrix(make_checkpoint: Any, tmp_path: Path) -> None:
    """Types only: the bytes of every type are compared on shallow models."""
    checkpoint = make_checkpoint(**DEEP)
    half = model_file(checkpoint, "F16", tmp_path / "f16.gguf")
    matrix = made_up(half, tmp_path / "m.gguf")
    for quant in MIXES:
        expected = llama_quantize(half.path, quant, tmp_path / "expected.gguf", matrix)
        types = {name: T(t.type).name for name, t in expected.tensors.items()}
        assert planned_types(checkpoint, quant, matrix) == types, quant


def test_the_tool_itself_gives_the_same_file(make_checkpoint: Any, tmp_path: Path) -> None:
    tool = shutil.which("llama-quantize") or shutil.which("llama-quantize", path=str(TOOLS))
    if tool is None:
        pytest.skip("llama-quantize is not built here")
    checkpoint = make_checkpoint(layers=1, ffn=256)
    half = model_file(checkpoint, "F16", tmp_path / "f16.gguf")
    matrix = made_up(half, tmp_path / "m.gguf")
    converted = model_file(checkpoint, "IQ3_XXS", tmp_path / "converted.gguf", matrix)
    command = [tool, "--imatrix", "m.gguf", "f16.gguf", "expected.gguf", "IQ3_XXS", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = Header.read(tmp_path / "expected.gguf")
    same(converted, expected, "IQ3_XXS")
    assert (converted.keys, converted.key_types) == (expected.keys, expected.key_types)


def test_types_that_need_a_matrix_are_refused_without(make_checkpoint: Any) -> None:
    assert len(NEED_MATRIX) == 8
    for quant in NEED_MATRIX:
        with pytest.raises(UnsupportedOption, match=f"--quant {quant}: found no importance matrix"):
            plan(make_checkpoint(), quant=quant)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e29])
def test_weights_of_any_size_quantize(value: float) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 256), dtype=np.float32)
    weights = np.full(256, value, np.float32)
    for kind in {t for t, _ in TEXT_TYPES.values()}:
        assert quantize(rows, kind, "w", weights)


def test_matrices_that_are_not_for_this_model(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(layers=2, ffn=256)
    half = model_file(checkpoint, "F16", tmp_path / "f16.gguf")
    narrow = made_up(half, tmp_path / "n.gguf", **{"blk.1.attn_q.weight": (np.ones(128), 5)})
    with pytest.raises(ConvertError, match=r"128 columns for blk\.1\.attn_q\.weight, expected 256"):
        plan(checkpoint, imatrix=narrow)
    short = write_matrix(tmp_path / "s.gguf", {"blk.0.attn_q.weight": (np.ones(256), 5)}, ["x"], 1, 512)
    with pytest.raises(ConvertError, match=r"no entry for blk\.0\.attn_"):
        plan(checkpoint, imatrix=short)
    for wrong in (-1.0, np.nan, np.inf, 1e35):
        bad = made_up(half, tmp_path / "b.gguf", **{"blk.1.attn_q.weight": (np.full(256, wrong), 5)})
        with pytest.raises(ConvertError, match=r"blk\.1\.attn_q\.weight.* holds") as caught:
            plan(checkpoint, imatrix=bad)
        assert "\n" not in str(caught.value)


def test_damaged_matrices(make_checkpoint: Any, tmp_path: Path, bundle: Bundle) -> None:
    half = model_file(make_checkpoint(layers=2, ffn=256), "F16", tmp_path / "f16.gguf")
    whole = made_up(half, tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for n in (0, 10, 200, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:n])
        with pytest.raises(ConvertError, match=r"cut\.gguf: not an importance matrix in GGUF"):
            read_matrix(path, "Q4_0")
    with pytest.raises(ConvertError, match=r"found general\.type 'model', expected 'imatrix'"):
        read_matrix(bundle.model, "Q4_0")
    with pytest.raises(ConvertError, match="found nothing, expected an importance matrix"):
        read_matrix(tmp_path / "none.gguf", "Q4_0")


@pytest.mark.parametrize(("kind", "count"), [(5, -1), (11, -(2**40)), (10, 2**64 - 1), (6, 0.5), (8, "many")])
def test_a_count_of_chunks_that_no_key_can_hold_is_left_out(
    make_checkpoint: Any, tmp_path: Path, kind: int, count: Any
) -> None:
    half = model_file(make_checkpoint(layers=2, ffn=256), "F16", tmp_path / "f16.gguf")
    path = made_up(half, tmp_path / "m.gguf")
    file = File.read(path)
    file.keys = [
        (n, kind, count, 0) if n == "imatrix.chunk_count" else (n, k, v, i) for n, k, v, i in file.keys
    ]
    path.write_bytes(file.header() + file.data)
    matrix = read_matrix(path, "Q4_0")
    assert matrix is not None
    recorded = matrix.keys()
    assert "quantize.imatrix.chunks_count" not in [key.name for key in recorded]


def test_ggmls_layout_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mul_mat_op() > 0

    class Shorter(ctypes.Structure):
        _fields_ = [(n, ctypes.c_void_p if n == "op" else kind) for n, kind in tensors.Tensor._fields_]

    monkeypatch.setattr(tensors, "Tensor", Shorter)
    mul_mat_op.cache_clear()
    with pytest.raises(BackendError, match="lays tensors out in another way"):
        mul_mat_op()
    mul_mat_op.cache_clear()


def test_sources_without_pictures_or_text(llava: Llava, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(InputError, match="no pictures, expected files that end in"):
        collect(llava, tmp_path, out)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="none of its 1 pictures could be used"):
        collect(llava, tmp_path, out)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(InputError, match=r"short\.txt: \d+ tokens, expected at least 512"):
        collect(llava, tmp_path / "short.txt", out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(InputError, match="is there already and is no importance matrix"):
        collect(llava, tmp_path, out)
    assert out.read_text() == "mine"


def test_sums_are_those_of_the_activations(llava: Llava, bundle: Bundle, tmp_path: Path) -> None:
    with llava.session() as session, Activations(session) as sums:
        n = sums.text([1, *range(300, 340)])
    assert n == 41
    names = {
        n
        for n, t in Header.read(bundle.model).tensors.items()
        if len(t.shape) == 2 and not n.startswith("token")
    }
    assert set(sums.sums) == names
    assert {count for _, count in sums.sums.values()} == {41}
    q, k = (sums.sums[f"blk.0.attn_{p}.weight"][0] for p in "qk")
    assert np.array_equal(q, k)  # one input
    gate = GGUFReader(bundle.model)
    norm = next(t for t in gate.tensors if t.name == "blk.0.attn_norm.weight").data
    assert np.isclose(
        (q / np.square(norm)).sum(), 41 * q.size, rtol=1e-3
    )  # RMS norm: each row's mean square is 1


def test_a_matrix_from_pictures_counts_image_positions(
    llava: Llava, tmp_path: Path, make_checkpoint: Any
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    from pictures import four

    for n, picture in enumerate(four()[:2]):
        (pictures / f"{n}.png").write_bytes(picture)
    (pictures / "notes.txt").write_text("not a picture")
    out = tmp_path / "imatrix.gguf"
    done = collect(llava, pictures, out, questions=["What is it?"], answer_tokens=3)
    assert done.images == 2
    assert done.positions >= 2 * (576 + 4)
    keys = Header.read(out).keys
    assert (keys["general.type"], keys["imatrix.chunk_count"]) == ("imatrix", 2)
    made = convert(make_checkpoint(), tmp_path / "bundle", quant="IQ2_XXS", imatrix=out)
    assert made.manifest.types.model == "IQ2_XXS"


def test_sums_equal_llama_cpps_tool(llava: Llava, bundle: Bundle, tmp_path: Path) -> None:
    tool = shutil.which("llama-imatrix") or shutil.which("llama-imatrix", path=str(TOOLS))
    if tool is None:
        pytest.skip("llama-imatrix is not built here")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox is what the picture shows and where it is. " * 60)
    command = [
        tool,
        "-m",
        str(bundle.model),
        "-f",
        str(text),
        "-o",
        str(tmp_path / "expected.gguf"),
        "-c",
        "128",
    ]
    command += [
        "-b",
        "128",
        "-ub",
        "128",
        "-t",
        "2",
        "-ngl",
        "0",
        "--process-output",
        "--no-ppl",
        "-fa",
        "off",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    collected = tmp_path / "collected.gguf"
    collect(llava, text, collected, chunk=128)
    matrix, expected = read_matrix(collected, "Q4_0"), read_matrix(tmp_path / "expected.gguf", "Q4_0")
    assert matrix
    assert expected
    assert set(matrix.values) == set(expected.values)
    assert matrix.chunks == expected.chunks
    for name, value in expected.values.items():
        assert np.linalg.norm(matrix.values[name] - value) <= 1e-4 * np.linalg.norm(value), name

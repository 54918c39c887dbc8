"""Compares what was written with what was planned: names, shapes, types, keys, every value; then a load test.

Every value of a chunk is compared with its source right after it was quantized, in the same thread, while both are
in memory (0.4 ms per million values of Q4_K, beside 77 ms for quantizing them). So the source is read once. The
load test runs in a child process, because llama.cpp aborts on what it does not expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from pocketllava.convert.plan.file_plan import FilePlan, PlannedTensor
from pocketllava.convert.plan.quantize import ERROR_BOUNDS, Floats, dequantize
from pocketllava.errors import BackendError, BundleError, ConvertError
from pocketllava.llamacpp import load_test as child
from pocketllava.llamacpp.children import run_child
from pocketllava.models.gguf_header import Header
from pocketllava.models.mmproj_contract import check_mmproj
from pocketllava.models.text_contract import check_text

SquaredSums = tuple[float, float]  # of differences, of source values


def verify_file(plan: FilePlan, path: Path) -> Header:
    """Compare a written file's header with the plan. Raises ConvertError naming what differs."""
    try:
        header = Header.read(path)
    except BundleError as error:
        raise ConvertError(f"verification failed: {error}") from error
    _compare_lists(plan, header)
    _compare_keys(plan, header)
    return header


def check_contracts(text: Header, mmproj: Header) -> None:
    """Refuse files that llama.cpp would end the process over. Raises ConvertError."""
    try:
        check_text(text)
        check_mmproj(mmproj)
    except BundleError as error:
        raise ConvertError(f"llama.cpp cannot load what this would make: {error}") from error


def difference(data: bytes, kind: GGMLQuantizationType, rows: Floats) -> SquaredSums:
    """Squared sums of quantized bytes minus their (n_rows, n_per_row) float32 source, and of the source."""
    source = rows.reshape(-1)
    values = dequantize(data, kind, source.size)
    error = values - source if kind is GGMLQuantizationType.F32 else np.subtract(values, source, out=values)
    return float(np.vdot(error, error)), float(np.vdot(source, source))


def check_error(tensor: PlannedTensor, sums: SquaredSums) -> None:
    """Hold a tensor's relative error to its type's bound; F16 may add its smallest step to each value."""
    tiny = tensor.n_rows * tensor.n_per_row * 2.0**-50 if tensor.type.name == "F16" else 0.0
    bound = ERROR_BOUNDS[tensor.type]
    if not sums[0] <= bound**2 * sums[1] + tiny:
        error = (sums[0] / sums[1]) ** 0.5 if sums[1] else float("inf")
        raise ConvertError(
            f"verification failed: tensor {tensor.name} differs from {tensor.source.name} by {error:.3g} of its"
            f" norm, expected at most {bound:.3g} for {tensor.type.name}; report this with the checkpoint's name"
        )


def _compare_lists(plan: FilePlan, header: Header) -> None:
    planned = [(t.name, t.shape, int(t.type)) for t in plan.tensors]
    written = [(t.name, t.shape, t.type) for t in header.tensors.values()]
    if planned != written:
        pairs = zip(planned, written, strict=False)
        expected, actual = next((pair for pair in pairs if pair[0] != pair[1]), (len(planned), len(written)))
        raise ConvertError(f"verification failed: {header.path}: found {actual!r}, expected {expected!r}")


def _compare_keys(plan: FilePlan, header: Header) -> None:
    for key in plan.keys:
        value, kind = header.keys.get(key.name), header.key_types.get(key.name)
        if kind != int(key.kind) or (not _has_floats(key.value) and value != key.value):
            raise ConvertError(f"verification failed: {header.path}: key {key.name} reads back as {value!r}")


def _has_floats(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, list) and isinstance(value[0], float))


def load_test(model: Path, mmproj: Path, worker_command: Sequence[str] | None = None) -> None:
    """Load both files with llama.cpp in a child process, evaluate a token and encode an image there.

    worker_command: see children.run_child. Raises ConvertError with the child's last line if it fails, crashes or
    hangs, and where no child can be started.
    """
    try:
        result = run_child(child.FUNCTION, model, mmproj, worker_command=worker_command)
    except BackendError as error:
        raise ConvertError(f"load test: {error}") from error
    if result.answer is not True or result.exit_code != 0:
        raise ConvertError(f"load test: llama.cpp could not use the converted files ({result.reason})")

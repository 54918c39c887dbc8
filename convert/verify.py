"""Re-opens what was written: names, shapes, types, and every value against the source; then a load test.

Knows a file plan and a file; reads both again, independently of how the file was written. The load test
runs in a child process, because llama.cpp aborts on what it does not expect.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from pocketllava.convert.ordered import in_order
from pocketllava.convert.plan import FilePlan, PlannedTensor, SourceReader
from pocketllava.convert.quantize import ERROR_BOUNDS, dequantize
from pocketllava.errors import BundleError, ConvertError
from pocketllava.models.header import Header

LOAD_TEST_TIMEOUT_S = 600
Sums = tuple[float, float]  # of squared differences, of squared source values
Difference = tuple[PlannedTensor, Sums, int]  # tensor, sums over a piece, its source bytes


def verify_file(
    plan: FilePlan, path: Path, reader: SourceReader, threads: int, advance: Callable[[int], None]
) -> None:
    """Compare a written file with its plan and its source. Raises ConvertError naming the tensor."""
    try:
        header = Header.read(path)
    except BundleError as error:
        raise ConvertError(f"verification failed: {error}") from error
    _compare_lists(plan, header)
    _compare_keys(plan, header)
    totals: dict[str, Sums] = {}
    for tensor, sums, source_bytes in in_order(_jobs(plan, header, reader), threads):
        before = totals.get(tensor.name, (0.0, 0.0))
        totals[tensor.name] = (before[0] + sums[0], before[1] + sums[1])
        advance(source_bytes)
    for tensor in plan.tensors:
        _check_error(tensor, totals[tensor.name])


def _compare_lists(plan: FilePlan, header: Header) -> None:
    expected = [(t.name, t.shape, int(t.type)) for t in plan.tensors]
    found = [(t.name, t.shape, t.type) for t in header.tensors.values()]
    if expected != found:
        odd = next(
            (pair for pair in zip(expected, found, strict=False) if pair[0] != pair[1]), (expected, found)
        )
        raise ConvertError(f"verification failed: {header.path}: found {odd[1]!r}, expected {odd[0]!r}")


def _compare_keys(plan: FilePlan, header: Header) -> None:
    for key in plan.keys:
        found, kind = header.keys.get(key.name), header.key_types.get(key.name)
        if kind != int(key.kind) or (not _has_floats(key.value) and found != key.value):
            raise ConvertError(f"verification failed: {header.path}: key {key.name} reads back as {found!r}")


def _has_floats(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, list) and isinstance(value[0], float))


def _jobs(plan: FilePlan, header: Header, reader: SourceReader) -> Iterator[Callable[[], Difference]]:
    """One job a piece; both files are read here."""
    with header.path.open("rb") as file:
        for tensor in plan.tensors:
            row_bytes = tensor.n_bytes // tensor.n_rows
            file.seek(header.data_start + header.tensors[tensor.name].offset)
            for first, count in tensor.chunks():
                written, raw = file.read(count * row_bytes), reader.rows(tensor, first, count)
                yield partial(_difference, tensor, written, raw)


def _difference(tensor: PlannedTensor, written: bytes, raw: bytes) -> Difference:
    expected = tensor.to_float(raw).reshape(-1)
    difference = dequantize(written, tensor.type, expected.size) - expected
    return tensor, (float(np.vdot(difference, difference)), float(np.vdot(expected, expected))), len(raw)


def _check_error(tensor: PlannedTensor, sums: Sums) -> None:
    """Hold a tensor's relative error to its type's bound; F16 may add its smallest step to each value."""
    tiny = tensor.n_rows * tensor.n_per_row * 2.0**-50 if tensor.type.name == "F16" else 0.0
    bound = ERROR_BOUNDS[tensor.type]
    if not sums[0] <= bound**2 * sums[1] + tiny:
        found = (sums[0] / sums[1]) ** 0.5 if sums[1] else float("inf")
        raise ConvertError(
            f"verification failed: tensor {tensor.name} differs from {tensor.source.name} by {found:.3g} of its"
            f" norm, expected at most {bound:.3g} for {tensor.type.name}; report this with the checkpoint's name"
        )


def load_test(model: Path, mmproj: Path) -> None:
    """Load both files with llama.cpp in a child process, evaluate a token and encode an image there.

    Raises ConvertError with the child's last words if it fails, crashes or hangs.
    """
    command = [sys.executable, "-m", "pocketllava.convert.loadtest", str(model), str(mmproj)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LOAD_TEST_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConvertError(f"load test: could not be run ({error})") from error
    if done.returncode:
        words = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        ending = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ConvertError(
            f"load test: llama.cpp could not use the converted files ({ending}): {words[-1] if words else 'silent'}"
        )

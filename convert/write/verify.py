"""What was written is what was planned: names, shapes, types, keys, every value, every byte; then a load test.

Every value of a piece is compared with its source right after it was quantized, in the same thread, while
both are at hand (0.4 ms per million values of Q4_K, beside 77 ms for quantizing them); what is written is
compared with what the disk then holds (pages.py). So the source is read once, and nothing on the disk is
unchecked. The load test runs in a child process, because llama.cpp aborts on what it does not expect.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from pocketllava.convert.plan.file_plan import FilePlan, PlannedTensor
from pocketllava.convert.plan.quantize import ERROR_BOUNDS, Floats, dequantize
from pocketllava.errors import BundleError, ConvertError
from pocketllava.models.gguf_header import Header

LOAD_TEST_TIMEOUT_S = 600
Sums = tuple[float, float]  # of squared differences, of squared source values


def verify_file(plan: FilePlan, path: Path) -> None:
    """Hold a written file's header to the plan. Raises ConvertError naming what differs."""
    try:
        header = Header.read(path)
    except BundleError as error:
        raise ConvertError(f"verification failed: {error}") from error
    _compare_lists(plan, header)
    _compare_keys(plan, header)


def difference(data: bytes, kind: GGMLQuantizationType, rows: Floats) -> Sums:
    """How far quantized bytes are from the (n_rows, n_per_row) float32 that they stand for."""
    expected = rows.reshape(-1)
    back = dequantize(data, kind, expected.size)
    lost = back - expected if kind is GGMLQuantizationType.F32 else np.subtract(back, expected, out=back)
    return float(np.vdot(lost, lost)), float(np.vdot(expected, expected))


def check_error(tensor: PlannedTensor, sums: Sums) -> None:
    """Hold a tensor's relative error to its type's bound; F16 may add its smallest step to each value."""
    tiny = tensor.n_rows * tensor.n_per_row * 2.0**-50 if tensor.type.name == "F16" else 0.0
    bound = ERROR_BOUNDS[tensor.type]
    if not sums[0] <= bound**2 * sums[1] + tiny:
        found = (sums[0] / sums[1]) ** 0.5 if sums[1] else float("inf")
        raise ConvertError(
            f"verification failed: tensor {tensor.name} differs from {tensor.source.name} by {found:.3g} of its"
            f" norm, expected at most {bound:.3g} for {tensor.type.name}; report this with the checkpoint's name"
        )


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


def load_test(model: Path, mmproj: Path) -> None:
    """Load both files with llama.cpp in a child process, evaluate a token and encode an image there.

    Raises ConvertError with the child's last words if it fails, crashes or hangs.
    """
    command = [sys.executable, "-m", "pocketllava.convert.write.load_test", str(model), str(mmproj)]
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

"""float32 -> Q8_0, bit for bit as ggml's quantize_row_q8_0_ref (ggml-quants.c), by numpy's vector code.

ggml calls roundf for each value, which took most of the time of a conversion to Q8_0. Knows that one type:
blocks of 32 int8 and their scale in F16, the largest magnitude over 127.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

VALUES = 32
BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", (VALUES,))])
BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))  # added, then cut off, it rounds as roundf does
SIGN = np.uint32(1 << 31)


def q8_0(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8] | None:
    """Contiguous finite float32 -> the bytes of their blocks; None for blocks too small for float32 to divide by."""
    blocks = rows.reshape(-1, VALUES)
    magnitudes = np.abs(blocks)
    scales = _largest(magnitudes) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
        inverse[scales == 0] = 0
        if not np.isfinite(inverse).all():
            return None
        made = np.empty(len(blocks), BLOCK)
        made["scale"] = scales  # beyond F16's range: infinite, as ggml's
    scaled = np.multiply(blocks, inverse[:, None], out=magnitudes)
    made["values"] = _rounded(scaled)
    return made.view(np.uint8)


def _largest(magnitudes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The largest of each block: by halves, which is faster than numpy's maximum along a short axis."""
    half = np.maximum(magnitudes[:, :16], magnitudes[:, 16:]).reshape(-1)
    while half.size > len(magnitudes):
        half = np.maximum(half[0::2], half[1::2])
    return half


def _rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """To the nearest integer, halves away from zero, as C's roundf (correct to 2**22; these are within 127)."""
    signed = values.view(np.uint32) & SIGN  # np.copysign by bits, in a third of its time
    signed |= BELOW_HALF.view(np.uint32)
    rounded = signed.view(np.float32)
    rounded += values
    return rounded.astype(np.int8)

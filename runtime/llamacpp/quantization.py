"""ggml's quantizer: float32 rows -> a type's bytes and back, as numpy arrays.

Knows ctypes and ggml's calls, which release the GIL; nothing of tensors' names, files or mixes of types.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from pocketllava.llamacpp.library import ggml, to_float

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def quantize_rows(rows: Floats, kind: int, n_bytes: int, importance: Floats | None = None) -> Bytes | None:
    """(n_rows, n_per_row) contiguous float32 -> (n_bytes,) uint8 of a ggml_type, by ggml_quantize_chunk.

    importance: (n_per_row,) float32, how much an error in each column counts. n_per_row must be a multiple of
    the type's block, or ggml ends the process. None if ggml wrote another number of bytes.
    """
    n_rows, n_per_row = rows.size // rows.shape[-1], rows.shape[-1]
    out = np.empty(n_bytes, np.uint8)
    weights = None if importance is None else _pointer(importance)
    written = ggml().ggml_quantize_chunk(kind, _pointer(rows), _pointer(out), 0, n_rows, n_per_row, weights)
    return out if written == n_bytes else None


def dequantize_rows(data: Bytes, kind: int, n_values: int) -> Floats:
    """(n_bytes,) uint8 of a ggml_type -> (n_values,) float32, by the type's own to_float."""
    out = np.empty(n_values, np.float32)
    to_float(kind)(_pointer(data), _pointer(out), n_values)
    return out


def is_finite(data: bytes | Bytes, kind: int) -> bool:
    """Whether ggml finds neither NaN nor infinity in a type's bytes."""
    raw = np.frombuffer(data, np.uint8)
    return bool(ggml().ggml_validate_row_data(kind, _pointer(raw), raw.nbytes))


def _pointer(array: Floats | Bytes) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)

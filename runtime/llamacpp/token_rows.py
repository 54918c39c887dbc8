"""Rows of a text model's embedding matrix, as libllama looks them up: text in the form that images have.

Knows where the matrix is in its file, and ggml's conversion; no prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pocketllava.llamacpp.quantization import dequantize_rows
from pocketllava.models.files import open_regular
from pocketllava.models.gguf_header import F32, Header, TensorInfo

MATRIX = "token_embd.weight"


class TokenRows:
    """Reads single rows from the file, which stays unmapped: a question has a few dozen of them."""

    def __init__(self, path: Path, header: Header | None = None) -> None:
        """header: the file's, if it was read. Raises BundleError for a file that is no GGUF file, OSError."""
        header = header or Header.read(path)
        self._path, self._matrix = path, header.tensors[MATRIX]
        self._start = header.data_start + self._matrix.offset
        self._file_id = _file_id(path)

    def read(self, ids: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """(n, n_embd) float32 of n token ids; None once the file is another one than it was."""
        n_embd = self._matrix.shape[1]
        row_bytes = self._matrix.n_bytes // self._matrix.shape[0]
        data = bytearray()
        try:
            if _file_id(self._path) != self._file_id:
                return None
            with open_regular(self._path) as file:
                for i in ids:
                    file.seek(self._start + i * row_bytes)
                    data += file.read(row_bytes)
        except OSError:
            return None
        if len(data) != len(ids) * row_bytes:
            return None
        return _floats(np.frombuffer(data, np.uint8), self._matrix, len(ids) * n_embd).reshape(-1, n_embd)


def _floats(data: npt.NDArray[np.uint8], matrix: TensorInfo, n: int) -> npt.NDArray[np.float32]:
    return data.view(np.float32) if matrix.type == F32 else dequantize_rows(data, matrix.type, n)


def _file_id(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

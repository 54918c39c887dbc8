"""What is to be written: GGUF keys and tensors, each tensor with the source rows it comes from.

The shape that text.py and mmproj.py produce and writer.py and verify.py consume. Knows how one source
tensor becomes float32 rows in llama.cpp's order; nothing of types' mixes or of files' layout.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from pocketllava.convert.plan.quantize import dequantize, n_bytes
from pocketllava.convert.read.checkpoint import SourceTensor
from pocketllava.convert.write.pages import read_at
from pocketllava.errors import ConvertError, TensorMismatch, UnsupportedCheckpoint

CHUNK_VALUES = 1 << 19  # rows are read and quantized about 2 MB of float32 at a time


FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Key:
    """One GGUF key. `item` is the element type of an array."""

    name: str
    value: Any
    kind: GGUFValueType
    item: GGUFValueType | None = None


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output file. heads > 0: rows go from rotary halves to rotary pairs in each head.

    importance: (n_per_row,) float32 from an importance matrix, or None.
    column_groups: for each of that many equal groups of columns, the source's group that goes there.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    source: SourceTensor
    heads: int = 0
    importance: npt.NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    column_groups: tuple[int, ...] = (0,)

    @property
    def n_bytes(self) -> int:
        """Bytes in the output file, without padding."""
        return n_bytes(self.type, self.shape)

    @property
    def n_rows(self) -> int:
        """Rows, where a matrix's last axis is a row and a convolution is one row an output channel."""
        return 1 if len(self.shape) == 1 else self.shape[0]

    @property
    def n_per_row(self) -> int:
        """Values in a row."""
        return int(np.prod(self.shape, dtype=np.int64)) // self.n_rows

    @property
    def copied(self) -> bool:
        """Whether the source's bytes are the result: the same type, and nothing that changes a value's place."""
        moved = self.heads or len(self.column_groups) > 1
        return self.source.dtype == self.type.name and not moved

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) pieces of about CHUNK_VALUES values, whole heads where permuted."""
        unit = self.n_rows // self.heads if self.heads else 1
        step = max(1, CHUNK_VALUES // (self.n_per_row * unit)) * unit
        for first in range(0, self.n_rows, step):
            yield first, min(step, self.n_rows - first)

    def to_float(self, raw: bytes) -> npt.NDArray[np.float32]:
        """Source bytes of whole rows -> (rows, n_per_row) float32, in llama.cpp's row order."""
        rows = _float32(raw, self.source.dtype).reshape(-1, self.n_per_row)
        if len(self.column_groups) > 1:
            groups = rows.reshape(len(rows), len(self.column_groups), -1)
            rows = np.ascontiguousarray(groups[:, list(self.column_groups)]).reshape(rows.shape)
        if not self.heads:
            return rows
        half = self.n_rows // self.heads // 2
        paired = rows.reshape(-1, 2, half, self.n_per_row).swapaxes(1, 2)
        return np.ascontiguousarray(paired).reshape(rows.shape)


@dataclass(frozen=True)
class FilePlan:
    """One output file: keys in order, then tensors in order."""

    architecture: str
    keys: tuple[Key, ...]
    tensors: tuple[PlannedTensor, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the tensor data, padded to GGUF's alignment of 32."""
        return sum(-(-t.n_bytes // 32) * 32 for t in self.tensors)

    @property
    def header_bytes(self) -> int:
        """Size of keys and tensor list, to within a few kilobytes: lists are what counts."""
        lists = [key.value for key in self.keys if isinstance(key.value, list)]
        texts = sum(len(str(item).encode()) + 8 for items in lists for item in items)
        return texts + 64 * (len(self.keys) + len(self.tensors)) + (1 << 14)

    @property
    def source_bytes(self) -> int:
        """Bytes that have to be read from the checkpoint."""
        return sum(t.source.n_bytes for t in self.tensors)


class SourceReader:
    """Reads rows from a checkpoint's files, from any thread, and drops them from the page cache.

    By plain reads: a file that shrinks is an error, not SIGBUS.
    """

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def rows(self, tensor: PlannedTensor, first: int, count: int) -> bytes:
        """The source's bytes of `count` rows. Raises ConvertError if the file ends early."""
        source = tensor.source
        row_bytes = source.n_bytes // tensor.n_rows
        if source.computed is not None:
            return source.computed[first * row_bytes : (first + count) * row_bytes]
        try:
            data = read_at(self._file(source.file), source.offset + first * row_bytes, count * row_bytes)
        except OSError as error:
            raise ConvertError(f"{source.file}: cannot be read ({error.strerror or error})") from error
        if len(data) < count * row_bytes:
            raise ConvertError(
                f"{source.file}: ends inside tensor {source.name!r}; it changed while being read"
            )
        return data

    def _file(self, path: Path) -> BinaryIO:
        with self._lock:
            if path not in self._files:
                self._files[path] = path.open("rb", buffering=0)
            return self._files[path]


class TensorTaker:
    """Takes tensors from a checkpoint by canonical name, checking shapes; what is left over is an error."""

    def __init__(self, tensors: dict[str, SourceTensor], part: str) -> None:
        self._left = {name: t for name, t in tensors.items() if name.startswith(part + ".")}
        self._part = part

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds this tensor and it was not taken yet."""
        return name in self._left

    def take(self, name: str, shape: tuple[int, ...]) -> SourceTensor:
        """The tensor. Raises TensorMismatch when it is missing or has another shape."""
        if name not in self._left:
            raise TensorMismatch(
                f"{name}: missing, expected a tensor of shape {list(shape)}; the checkpoint is incomplete or its"
                " config.json describes another model",
                missing=(name,),
            )
        source = self._left.pop(name)
        if source.shape != shape:
            raise TensorMismatch(
                f"{source.name}: shape {list(source.shape)}, expected {list(shape)} from config.json",
                shape=source.shape,
            )
        if source.dtype not in FLOAT_TYPES:
            raise UnsupportedCheckpoint(
                f"{source.name}: stored as {source.dtype}, expected F32, F16 or BF16; convert the original"
            )
        return source

    def drop(self, prefix: str, reason: str, dropped: dict[str, str]) -> None:
        """Leave out every tensor whose canonical name begins so, and record why."""
        for name in [n for n in self._left if n.startswith(prefix)]:
            dropped[self._left.pop(name).name] = reason

    def finish(self) -> None:
        """Raise TensorMismatch if any tensor was neither taken nor dropped."""
        if left := [t.name for t in self._left.values()]:
            raise TensorMismatch(
                f"{left[0]}: unexpected tensor in the {self._part} part ({len(left)} such tensors); config.json"
                " describes a model without it",
                unexpected=tuple(left),
            )


def _float32(raw: bytes, dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "F32":
        return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)
    if dtype == "F16":
        return dequantize(raw, GGMLQuantizationType.F16, len(raw) // 2)
    wide = np.frombuffer(raw, "<u2").astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)

"""The plan of one output file: GGUF keys and tensors, each tensor with the source rows it comes from.

text.py and mmproj.py produce plans, writer.py and verify.py consume them. Knows how one source tensor becomes
float32 rows in llama.cpp's order; nothing of mixes of types or of the files' layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from pocketllava.convert.plan.quantize import dequantize, n_bytes
from pocketllava.convert.read.checkpoint import UNINDEXED
from pocketllava.convert.read.sources import SourceTensor
from pocketllava.errors import TensorMismatch, UnsupportedCheckpoint
from pocketllava.models.gguf_header import ALIGNMENT, ARCHITECTURE, Header, TensorInfo
from pocketllava.models.gguf_writer import Key

CHUNK_VALUES = 1 << 19  # rows are read and quantized about 2 MB of float32 at a time
FLOAT_TYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output file. heads > 0: rows go from rotary halves to rotary pairs in each head.

    importance: (n_per_row,) float32 from an importance matrix, or None.
    column_groups: the source's columns, cut into that many equal groups, are taken in this order of groups.
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
        """Whether the source's bytes are the result: the same type, rows and columns in the same order."""
        reordered = self.heads or len(self.column_groups) > 1
        return self.source.dtype == self.type.name and not reordered

    @property
    def source_row_bytes(self) -> int:
        """Bytes of one row in the source."""
        return self.source.n_bytes // self.n_rows

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of chunks of about CHUNK_VALUES values, of entire heads where permuted."""
        unit = self.n_rows // self.heads if self.heads else 1
        step = max(1, CHUNK_VALUES // (self.n_per_row * unit)) * unit
        for first in range(0, self.n_rows, step):
            yield first, min(step, self.n_rows - first)

    def to_float(self, raw: bytes) -> npt.NDArray[np.float32]:
        """Source bytes of complete rows -> (n_rows, n_per_row) float32, in llama.cpp's row and column order."""
        rows = _float32(raw, self.source.dtype).reshape(-1, self.n_per_row)
        if len(self.column_groups) > 1:
            groups = rows.reshape(len(rows), len(self.column_groups), -1)  # (n_rows, n_groups, group width)
            rows = np.ascontiguousarray(groups[:, list(self.column_groups)]).reshape(rows.shape)
        if not self.heads:
            return rows
        half = self.n_rows // self.heads // 2
        paired = rows.reshape(-1, 2, half, self.n_per_row).swapaxes(1, 2)  # (heads, half, 2, n_per_row)
        return np.ascontiguousarray(paired).reshape(rows.shape)


@dataclass(frozen=True)
class FilePlan:
    """One output file: keys in order, then tensors in order."""

    architecture: str
    keys: tuple[Key, ...]
    tensors: tuple[PlannedTensor, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the tensor data, padded to GGUF's alignment."""
        return sum(-(-t.n_bytes // ALIGNMENT) * ALIGNMENT for t in self.tensors)

    @property
    def header_bytes(self) -> int:
        """Size of keys and tensor list, to within a few kilobytes; the vocabulary's lists dominate."""
        lists = [key.value for key in self.keys if isinstance(key.value, list)]
        texts = sum(len(str(item).encode()) + 8 for items in lists for item in items)
        return texts + 64 * (len(self.keys) + len(self.tensors)) + (1 << 14)

    def header(self, path: Path) -> Header:
        """The header that the file at `path` will have, to check before hours of work; without its own size."""
        tensors, end = {}, 0
        for t in self.tensors:
            tensors[t.name] = TensorInfo(t.name, t.shape, int(t.type), end, t.n_bytes)
            end += -(-t.n_bytes // ALIGNMENT) * ALIGNMENT
        keys = (Key(ARCHITECTURE, self.architecture, GGUFValueType.STRING), *self.keys)
        return Header(
            path,
            {key.name: key.value for key in keys},
            {key.name: int(key.kind) for key in keys},
            tensors,
            data_start=self.header_bytes,
            file_bytes=self.header_bytes + end,
            item_types={key.name: int(key.item) for key in keys if key.item is not None},
        )

    @property
    def source_bytes(self) -> int:
        """Bytes that have to be read from the checkpoint."""
        return sum(t.source.n_bytes for t in self.tensors)


class TensorTaker:
    """Takes tensors from a checkpoint by canonical name and checks their shapes; a tensor left over is an error."""

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
        """Leave out every tensor whose canonical name has the prefix, and record the reason."""
        for name in [n for n in self._left if n.startswith(prefix)]:
            dropped[self._left.pop(name).name] = reason

    def finish(self, dropped: dict[str, str]) -> None:
        """Raise TensorMismatch if any tensor was neither taken nor dropped; one that no index names is dropped."""
        dropped |= {t.name: UNINDEXED for t in self._left.values() if not t.indexed}
        if left := [t.name for t in self._left.values() if t.indexed]:
            raise TensorMismatch(
                f"{left[0]}: unexpected tensor in the {self._part} part ({len(left)} such tensors); config.json"
                " describes a model without it",
                unexpected=tuple(left),
            )


def _float32(raw: bytes, dtype: str) -> npt.NDArray[np.float32]:
    """Bytes of F32, F16 or BF16 -> (n_values,) float32."""
    if dtype == "F32":
        return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)
    if dtype == "F16":
        return dequantize(raw, GGMLQuantizationType.F16, len(raw) // 2)
    wide = np.frombuffer(raw, "<u2").astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)

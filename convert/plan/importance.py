"""An importance matrix in GGUF -> one weight per input column of each text matrix, for the quantizer.

Knows the file that `pocketllava imatrix` and llama.cpp's llama-imatrix write, and that values are
sums / counts as llama-quantize reads them; nothing of checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

from pocketllava.convert.plan.quantize import NEED_MATRIX, UNQUANTIZED
from pocketllava.errors import BundleError, ConvertError, UnsupportedOption
from pocketllava.models.files import expanded
from pocketllava.models.gguf_header import Header
from pocketllava.models.gguf_writer import Key

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = (f"imatrix.{n}" for n in ("datasets", "chunk_count", "chunk_size"))
FLOATS = tuple(kind.name for kind in UNQUANTIZED)
MAX_KEY_BYTES = 127  # llama-quantize cuts its texts there
LARGEST = 1e30  # beyond it products in the quantizers' float32 overflow


@dataclass(frozen=True)
class ImportanceMatrix:
    """A matrix file's content: (n_per_row,) float32 by tensor name, and the data it was computed from."""

    path: Path
    values: dict[str, npt.NDArray[np.float32]] = field(repr=False)
    datasets: tuple[str, ...]
    chunks: int

    def of(self, name: str, shape: tuple[int, ...], kind: T) -> npt.NDArray[np.float32] | None:
        """(n_per_row,) float32 for a tensor, None where none are wanted. Raises ConvertError for another model's."""
        if kind in UNQUANTIZED:
            return None
        weights = self.values.get(name)
        if weights is None and name.startswith("blk."):
            raise ConvertError(
                f"{self.path}: no entry for {name}, expected one for every matrix; it was made for another model"
            )
        if weights is not None and weights.size != shape[-1]:
            raise ConvertError(
                f"{self.path}: {weights.size} columns for {name}, expected {shape[-1]}; it was made for another model"
            )
        return weights

    def keys(self) -> list[Key]:
        """The keys by which llama-quantize records its matrix; of the path only the file's name."""
        keys = [Key("quantize.imatrix.file", _cut(self.path.name), V.STRING)]
        if self.datasets:
            keys.append(Key("quantize.imatrix.dataset", _cut(self.datasets[0]), V.STRING))
        keys.append(Key("quantize.imatrix.entries_count", len(self.values), V.UINT32))
        if self.chunks:
            keys.append(Key("quantize.imatrix.chunks_count", self.chunks, V.UINT32))
        return keys


def read_matrix(path: str | PathLike[str] | None, *quants: str) -> ImportanceMatrix | None:
    """The matrix, checked. Raises UnsupportedOption if one of the types needs one and there is none, ConvertError."""
    if path is None:
        if needing := [quant for quant in quants if quant in NEED_MATRIX]:
            raise UnsupportedOption(
                f"--quant {needing[0]}: found no importance matrix, which this type needs; make one from pictures"
                " with `pocketllava imatrix` and give it as --imatrix"
            )
        return None
    file = expanded(fspath(path))
    if not file.is_file():
        state = "nothing" if not file.exists() else "a folder" if file.is_dir() else "no regular file"
        raise ConvertError(
            f"{file}: found {state}, expected an importance matrix; `pocketllava imatrix` makes one"
        )
    if quants and all(quant in FLOATS for quant in quants):
        raise UnsupportedOption(f"--imatrix: does nothing with --quant {quants[0]}, which is not quantized")
    try:
        header = Header.read(file)
    except BundleError as error:
        raise ConvertError(
            f"{file}: not an importance matrix in GGUF ({str(error).removeprefix(f'{file}: ')}); `pocketllava"
            " imatrix` makes one, and llama-imatrix since 2025"
        ) from error
    return _checked(header)


def _checked(header: Header) -> ImportanceMatrix:
    keys, path = header.keys, header.path
    missing = [k for k in (DATASETS, CHUNK_COUNT, CHUNK_SIZE) if k not in keys]
    if keys.get("general.type") != "imatrix" or missing:
        raise ConvertError(
            f"{path}: found general.type {keys.get('general.type')!r}, expected 'imatrix' with {DATASETS},"
            f" {CHUNK_COUNT} and {CHUNK_SIZE}; make one with `pocketllava imatrix`"
        )
    names = sorted({n.removesuffix(SUMS).removesuffix(COUNTS) for n in header.tensors})
    values = {name: _values(header, name) for name in names}
    if not values:
        raise ConvertError(f"{path}: an importance matrix without entries; make it again")
    datasets, chunks = keys[DATASETS], keys[CHUNK_COUNT]
    texts = tuple(map(str, datasets)) if isinstance(datasets, list) else ()
    known = isinstance(chunks, int) and 0 <= chunks < 1 << 32  # it becomes a key of that type
    return ImportanceMatrix(path, values, texts, chunks if known else 0)


def _values(header: Header, name: str) -> npt.NDArray[np.float32]:
    """(n_per_row,) float32: sums / counts, 1 where nothing was counted, as llama-quantize gives ggml."""
    sums, counts = _floats(header, name + SUMS), _floats(header, name + COUNTS)
    if counts.size != 1:
        raise ConvertError(
            f"{header.path}: {counts.size} counts for {name}, expected 1; not a Llama's matrix"
        )
    count = np.float32(round(float(counts[0])))
    with np.errstate(over="ignore"):
        values = sums / count if count > 0 else np.ones_like(sums)
    if not (np.isfinite(values).all() and (values >= 0).all() and (values < LARGEST).all()):
        raise ConvertError(f"{header.path}: {name} holds values that are no mean squares; make it again")
    return values


def _floats(header: Header, name: str) -> npt.NDArray[np.float32]:
    """(n_values,) float32 of a tensor."""
    info = header.tensors.get(name)
    if info is None or info.type != int(T.F32):
        raise ConvertError(f"{header.path}: no float32 tensor {name}; the importance matrix is damaged")
    with header.path.open("rb") as file:
        file.seek(header.data_start + info.offset)
        values: npt.NDArray[Any] = np.frombuffer(file.read(info.n_bytes), "<f4")
    if not np.isfinite(values).all():
        raise ConvertError(f"{header.path}: {name} holds NaN or infinite values; make it again")
    return np.ascontiguousarray(values, np.float32)


def _cut(text: str) -> str:
    return text.encode()[:MAX_KEY_BYTES].decode("utf-8", "ignore")

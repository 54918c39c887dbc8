"""Keys and a list of tensors -> a GGUF file's header; the one place that writes one.

Knows the container, through gguf's GGUFWriter; nothing of models. Tensor data is appended by the caller, in the
header's order, each tensor padded to ALIGNMENT.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.gguf_writer import WriterState

from pocketllava.errors import BundleError
from pocketllava.models.contract import shown
from pocketllava.models.gguf_header import ALIGNMENT, ARCHITECTURE, Header, TensorInfo

ALIGNMENT_KEY = "general.alignment"


@dataclass(frozen=True)
class Key:
    """One GGUF key. `item` is the element type of an array."""

    name: str
    value: Any
    kind: GGUFValueType
    item: GGUFValueType | None = None


class TensorEntry(Protocol):
    """What a header says of a tensor. `shape` is in numpy's order, rows first; `type` is a ggml_type."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def type(self) -> int: ...
    @property
    def n_bytes(self) -> int: ...


def header_bytes(architecture: str, keys: Iterable[Key], tensors: Iterable[TensorEntry]) -> bytes:
    """Everything in front of the tensor data, padded to ALIGNMENT. `keys` go without the architecture."""
    writer = GGUFWriter(None, architecture)
    for key in keys:
        writer.add_key_value(key.name, key.value, key.kind, sub_type=key.item)
    for t in tensors:
        dtype = np.dtype(np.float32)  # ignored: raw_dtype names the type
        kind = GGMLQuantizationType(t.type)
        writer.add_tensor_info(t.name, t.shape, dtype, t.n_bytes, raw_dtype=kind)
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY  # as if it had opened a file
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue() + padding(buffer.tell())


def padding(n_bytes: int) -> bytes:
    """The zeros that follow so many bytes."""
    return b"\0" * (-n_bytes % ALIGNMENT)


def stored_keys(header: Header) -> list[Key]:
    """A file's keys with their exact types, in order, without those that header_bytes writes itself.

    Raises BundleError for keys that cannot be written again as they are.
    """
    for name, value in header.keys.items():
        if value == [] or name in header.not_utf8:
            raise BundleError(
                f"{header.path}: key {shown(name)[1:-1]} holds an empty list or no UTF-8 text; download it again"
            )
    return [
        Key(name, value, GGUFValueType(header.key_types[name]), _item_type(header, name))
        for name, value in header.keys.items()
        if name not in (ARCHITECTURE, ALIGNMENT_KEY)
    ]


def _item_type(header: Header, name: str) -> GGUFValueType | None:
    return GGUFValueType(header.item_types[name]) if name in header.item_types else None


def write_floats(
    path: Path, architecture: str, keys: Iterable[Key], arrays: Mapping[str, npt.NDArray[np.float32]]
) -> Path:
    """Write a small file of float32 tensors (any shape, rows first) in the mapping's order. Raises OSError."""
    data = {name: np.ascontiguousarray(array, "<f4") for name, array in arrays.items()}
    f32 = int(GGMLQuantizationType.F32)
    infos = [TensorInfo(name, array.shape, f32, 0, array.nbytes) for name, array in data.items()]
    with path.open("wb") as file:
        file.write(header_bytes(architecture, keys, infos))
        for array in data.values():
            file.write(array.tobytes() + padding(array.nbytes))
    return path

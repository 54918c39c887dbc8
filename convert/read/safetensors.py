"""One safetensors file -> the offsets of its tensors, each checked. Reads the header, no tensor data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pocketllava.convert.read.sources import (
    LFS,
    WIDTHS,
    SourceTensor,
    is_count,
    lfs_pointer,
    opened,
    parse_json,
    size_bytes,
)
from pocketllava.errors import ConvertError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


def read_safetensors(path: Path) -> list[SourceTensor]:
    """The tensors of one file, every offset checked against the file's size.

    Format: an 8-byte little-endian header length, a JSON header, tensor data
    (https://huggingface.co/docs/safetensors). Raises ConvertError.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if head == LFS[:8]:
            raise lfs_pointer(path)
        length = int.from_bytes(head, "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ConvertError(f"{path}: {size} bytes, not a whole safetensors file; download it again")
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = [_tensor(path, name, entry, start, size) for name, entry in header.items()]
    end = start
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.offset < end:
            raise ConvertError(
                f"{path}: tensor {tensor.name!r} overlaps the one before it; download it again"
            )
        end = tensor.offset + tensor.n_bytes
    return tensors


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> SourceTensor:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = isinstance(dtype, str) and all(is_count(n) for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise ConvertError(f"{path}: tensor {name!r} has a damaged header entry; download the file again")
    if dtype in WIDTHS and last - first != (n_bytes := size_bytes(dtype, shape)):
        raise ConvertError(
            f"{path}: tensor {name!r} takes {last - first} bytes, expected {n_bytes} for {dtype} {list(shape)}"
        )
    if first > last or start + last > size:
        raise ConvertError(
            f"{path}: {size} bytes, but tensor {name!r} ends at {start + last}; the file is truncated:"
            " download it again"
        )
    return SourceTensor(name, path, start + first, last - first, dtype, shape)

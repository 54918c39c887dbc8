"""The record of a source tensor, and the reading of JSON files: shared by every weight format.

Knows JSON files and git-lfs pointers; no weight format and no model.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pocketllava.errors import ConvertError
from pocketllava.models.files import open_regular, read_regular

WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
WIDTHS |= {"F8_E4M3": 1, "F8_E5M2": 1}
MAX_COUNT = 1 << 40  # of values along an axis, or bytes into a file
MAX_JSON_BYTES = 128 << 20  # the largest tokenizer.json there is has 35 MB
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class SourceTensor:
    """The file and offset of one tensor's bytes. `shape` is rows first; `dtype` is safetensors' code.

    computed: the bytes themselves, for a tensor that is computed from config.json and is in no file. indexed: False
    for one that its shards' index does not name.
    """

    name: str
    file: Path
    offset: int
    n_bytes: int
    dtype: str
    shape: tuple[int, ...]
    computed: bytes | None = None
    indexed: bool = True


def size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a contiguous tensor takes; dtype is one of WIDTHS."""
    return WIDTHS[dtype] * math.prod(shape)


def is_count(n: Any) -> bool:
    """Whether n can be a length or an offset."""
    return type(n) is int and 0 <= n < MAX_COUNT


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises ConvertError."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A small file of a checkpoint. Raises ConvertError for what is no regular file, or larger than any such file."""
    try:
        return read_regular(path, max_bytes)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror or error})") from error


def opened(path: Path) -> BinaryIO:
    """A weight file. Raises ConvertError for what is no regular file."""
    try:
        return open_regular(path)
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror or error})") from error


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object; `path` is named where it is none. Raises ConvertError."""
    if data.startswith(LFS):
        raise lfs_pointer(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def lfs_pointer(path: Path) -> ConvertError:
    """The error for a git-lfs pointer in a file's place."""
    return ConvertError(f"{path}: a git-lfs pointer, not the file; run `git lfs pull` or download it")

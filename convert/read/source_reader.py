"""Bytes of source tensors, read from any thread and then dropped from the page cache.

Knows file descriptors and what the platform offers; nothing of tensors' layout. Where a call does not exist
(macOS, Windows) the kernel's cache keeps the pages, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import BinaryIO

from pocketllava.convert.read.sources import SourceTensor
from pocketllava.errors import ConvertError


class SourceReader:
    """Opens each file once. By plain reads, not a map: a file that shrinks is an error, not SIGBUS."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SourceReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, source: SourceTensor, first_byte: int, n_bytes: int) -> bytes:
        """n_bytes of a tensor from first_byte on. Raises ConvertError if the file ends early."""
        if source.computed is not None:
            return source.computed[first_byte : first_byte + n_bytes]
        try:
            data = self._read_at(self._file(source.file), source.offset + first_byte, n_bytes)
        except OSError as error:
            raise ConvertError(f"{source.file}: cannot be read ({error.strerror or error})") from error
        if len(data) < n_bytes:
            raise ConvertError(
                f"{source.file}: ends inside tensor {source.name!r}; it changed while being read"
            )
        return data

    def _file(self, path: Path) -> BinaryIO:
        with self._lock:
            if path not in self._files:
                self._files[path] = path.open("rb", buffering=0)
            return self._files[path]

    def _read_at(self, file: BinaryIO, offset: int, n_bytes: int) -> bytes:
        """Up to n_bytes, fewer only at the file's end."""
        parts: list[bytes] = []
        position, end = offset, offset + n_bytes
        while position < end and (part := self._read_part(file, position, end - position)):
            parts.append(part)
            position += len(part)
        forget(file, offset, n_bytes)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_part(self, file: BinaryIO, offset: int, n_bytes: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(file.fileno(), n_bytes, offset)
        with self._lock:
            file.seek(offset)
            return file.read(n_bytes)


def forget(file: BinaryIO, offset: int = 0, n_bytes: int = 0) -> None:
    """Let the page cache drop part of a file (0: to the end): a hint, which holds for pages that are on the disk."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a file system that takes no advice
            os.posix_fadvise(file.fileno(), offset, n_bytes, os.POSIX_FADV_DONTNEED)

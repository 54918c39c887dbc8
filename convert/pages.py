"""Positioned reads from any thread, and a page cache that is given back: files here are read and written once.

Knows file descriptors and what the platform offers; nothing of models. Where a call does not exist (macOS,
Windows) the kernel keeps what it likes, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

FLUSH_BYTES = 64 << 20  # what may wait to be written to the disk before it is asked for
BLOCK_BYTES = 1 << 22
_seeking = threading.Lock()


def read_at(file: BinaryIO, offset: int, n_bytes: int) -> bytes:
    """Up to n_bytes from there (fewer only at the file's end), which the page cache may then forget."""
    parts: list[bytes] = []
    at, end = offset, offset + n_bytes
    while at < end and (part := _read(file, at, end - at)):
        parts.append(part)
        at += len(part)
    forget(file, offset, n_bytes)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read(file: BinaryIO, offset: int, n_bytes: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), n_bytes, offset)
    with _seeking:
        file.seek(offset)
        return file.read(n_bytes)


def forget(file: BinaryIO, offset: int = 0, n_bytes: int = 0) -> None:
    """Let the page cache drop that part (0: to the end) of a file; only a hint, and only what is on disk."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a file system that takes no advice
            os.posix_fadvise(file.fileno(), offset, n_bytes, os.POSIX_FADV_DONTNEED)


def sha256_of(path: Path, read: Callable[[int], None]) -> str:
    """SHA-256 of a whole file as the disk holds it. `read` is told the bytes of each block."""
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        forget(file)
        while n := file.readinto(block):
            digest.update(block[:n])
            read(n)
    return digest.hexdigest()


def blocks(file: BinaryIO, n_bytes: int) -> Iterator[bytes]:
    """The next n_bytes of a file, in blocks; fewer if it ends."""
    while n_bytes and (block := file.read(min(n_bytes, BLOCK_BYTES))):
        yield block
        n_bytes -= len(block)


class Flusher:
    """Has a file's new bytes written to the disk while the next ones are computed, and forgets them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "flush")
        self._last: Future[None] | None = None

    def ask(self, file: BinaryIO) -> None:
        """Write what the file holds by now to the disk, soon. Raises the OSError of the time before."""
        if self._last is None or self._last.done():
            self.wait()
            self._last = self._thread.submit(_flush, file)

    def wait(self) -> None:
        """Until all that was asked for is done. Raises its OSError."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def _flush(file: BinaryIO) -> None:
    getattr(os, "fdatasync", os.fsync)(file.fileno())
    forget(file)

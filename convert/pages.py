"""Positioned reads from any thread that the page cache forgets, writes that reach the disk, and proof that they did.

Knows file descriptors and what the platform offers; nothing of models. Where a call does not exist (macOS,
Windows) the kernel keeps what it likes, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
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


def forget(file: BinaryIO | FileIO, offset: int = 0, n_bytes: int = 0) -> None:
    """Let the page cache drop that part (0: to the end) of a file; only a hint, and only what is on disk."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a file system that takes no advice
            os.posix_fadvise(file.fileno(), offset, n_bytes, os.POSIX_FADV_DONTNEED)


def blocks(file: BinaryIO, n_bytes: int) -> Iterator[bytes]:
    """The next n_bytes of a file, in blocks; fewer if it ends."""
    while n_bytes and (block := file.read(min(n_bytes, BLOCK_BYTES))):
        yield block
        n_bytes -= len(block)


class ReadBack:
    """The SHA-256 of a file that still grows, as the disk holds it: read in whole blocks, past the page cache.

    The cache keeps the file for those who use it next; where there are no such reads (O_DIRECT), it is asked
    to forget what is to be read.
    """

    def __init__(self, path: Path) -> None:
        self._file, self._direct = _open(path)
        self._block = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self._digest, self._at = hashlib.sha256(), 0

    def read_to(self, end: int) -> None:
        """Go on up to there: a multiple of BLOCK_BYTES, or the end of a file that is whole."""
        if not self._direct:
            forget(self._file, self._at, end - self._at)
        while self._at < end and (n := self._file.readinto(self._block)):
            self._digest.update(self._block[:n])
            self._at += n

    def hexdigest(self) -> str:
        """Of what was read."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open(path: Path) -> tuple[FileIO, bool]:
    """A file to read from its beginning, and whether that goes past the page cache."""
    if direct := getattr(os, "O_DIRECT", 0):
        with contextlib.suppress(OSError):  # a file system without
            file = FileIO(path, opener=lambda name, flags: os.open(name, flags | direct))
            try:
                file.readinto(mmap.mmap(-1, mmap.PAGESIZE))
                file.seek(0)
                return file, True
            except OSError:
                file.close()
    return FileIO(path), False


class Flusher:
    """Has a file's new bytes written to the disk, and read back from there, while the next ones are computed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "flush")
        self._last: Future[ReadBack] | None = None
        self._back: ReadBack | None = None

    def ask(self, file: BinaryIO, end: int) -> None:
        """Have the first `end` bytes on the disk and read back, soon. Raises the OSError of the time before."""
        if self._last is None or self._last.done():
            self._wait()
            self._last = self._thread.submit(self._flush, file.fileno(), end - end % BLOCK_BYTES)

    def finish(self, file: BinaryIO, end: int) -> str:
        """Flush a whole file; the SHA-256, in hexadecimal, of what the disk then holds. Raises OSError."""
        self._wait()
        return self._flush(file.fileno(), end).hexdigest()

    def _flush(self, descriptor: int, end: int) -> ReadBack:
        getattr(os, "fdatasync", os.fsync)(descriptor)
        if self._back is None:
            self._back = ReadBack(self._path)
        self._back.read_to(end)
        return self._back

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
        if self._back is not None:
            self._back.close()

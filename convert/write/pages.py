"""Positioned reads from any thread that the page cache forgets, writes that reach the disk, and proof that they did.

Knows file descriptors and what the platform offers; nothing of models. Where a call does not exist (macOS,
Windows) the kernel keeps what it likes, and nothing else changes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pocketllava.errors import ConvertError

FLUSH_BYTES = 32 << 20  # what may wait to be written to the disk before it is asked for
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


def forget_all(path: Path) -> None:
    """Have a file on the disk, and forgotten by the page cache: what is read next is what the disk holds."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        forget(file)


def blocks(file: BinaryIO, n_bytes: int) -> Iterator[bytes]:
    """The next n_bytes of a file, in blocks; fewer if it ends."""
    while n_bytes and (block := file.read(min(n_bytes, BLOCK_BYTES))):
        yield block
        n_bytes -= len(block)


class Checked:
    """A file that is written while a thread has what was written flushed, and compared with what the disk then holds.

    It is read in whole blocks past the page cache, which keeps the file for those who use it next; where there
    are no such reads (O_DIRECT), the cache is asked to forget first. Twice FLUSH_BYTES wait in memory at most.
    """

    def __init__(self, path: Path, at: int) -> None:
        """Cut an existing file off at that byte, and go on there. Raises OSError."""
        self._path, self._start, self.end = path, at, at
        self._file = path.open("r+b")
        self._file.truncate(at)
        self._file.seek(at)
        self._disk, self._direct = _open(path)
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # aligned, as direct reads need it
        self._checked = at - at % BLOCK_BYTES
        self._new: list[bytes] = []
        self._unflushed = 0
        self._expected: deque[memoryview] = deque()
        self._thread = ThreadPoolExecutor(1, "flush")
        self._last: Future[None] | None = None

    def write(self, data: bytes) -> None:
        """Append. Raises OSError, and ConvertError if what the disk holds is not what was written earlier."""
        self._file.write(data)
        self._new.append(data)
        self.end += len(data)
        self._unflushed += len(data)
        if self._unflushed >= FLUSH_BYTES:
            self._wait()
            self.flush()
            self._last = self._thread.submit(self._check, self._new, self.end - self.end % BLOCK_BYTES)
            self._new, self._unflushed = [], 0

    def flush(self) -> None:
        """Let the system have all that was written. Raises OSError."""
        self._file.flush()

    def finish(self) -> None:
        """Have everything on the disk, and compared. Raises as write does."""
        self._wait()
        self.flush()
        self._check(self._new, self.end)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def _check(self, new: list[bytes], end: int) -> None:
        """Read on up to there: a multiple of BLOCK_BYTES, or the file's end."""
        self._expected.extend(map(memoryview, new))
        getattr(os, "fdatasync", os.fsync)(self._file.fileno())
        if not self._direct:
            forget(self._disk, self._checked, end - self._checked)
        self._disk.seek(self._checked)
        while self._checked < end:
            n = self._disk.readinto(self._block) or 0
            found = memoryview(self._block)[max(0, self._start - self._checked) : n]
            if n < min(BLOCK_BYTES, end - self._checked) or not self._as_written(found):
                raise ConvertError(
                    f"verification failed: {self._path}: from byte {self._checked} on the disk holds something else"
                    " than was written; the disk or the memory is faulty: check them, then convert again"
                )
            self._checked += n

    def _as_written(self, found: memoryview) -> bool:
        """Whether these are the next bytes that were written."""
        while found and self._expected:
            expected = self._expected.popleft()
            n = min(len(found), len(expected))
            if not np.array_equal(np.asarray(found[:n]), np.asarray(expected[:n])):
                return False
            found = found[n:]
            if n < len(expected):
                self._expected.appendleft(expected[n:])
        return True

    def close(self) -> None:
        """End the thread and close the file."""
        self._thread.shutdown()
        self._disk.close()
        self._file.close()


def _open(path: Path) -> tuple[FileIO, bool]:
    """A file to read from its beginning, and whether that goes past the page cache."""
    if direct := getattr(os, "O_DIRECT", 0):
        with contextlib.suppress(OSError):  # a file system without
            file = FileIO(path, opener=lambda name, flags: os.open(name, flags | direct))
            try:
                file.readinto(mmap.mmap(-1, mmap.PAGESIZE))
                return file, True
            except OSError:
                file.close()
    return FileIO(path), False

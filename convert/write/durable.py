"""A file that is written in order and flushed to the disk on the way, by a thread of its own.

Knows file descriptors; nothing of what is written. Without it a fast quantizer would leave gigabytes in the page
cache, and a slow disk would begin to write them only when the conversion is done.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

FLUSH_BYTES = 32 << 20  # written to the page cache before the disk is asked to take them


class DurableFile:
    """Append-only. Of what was written, at most twice FLUSH_BYTES are not on the disk."""

    def __init__(self, path: Path, end: int) -> None:
        """Cut an existing file off at byte `end` and continue there, or create one. Raises OSError."""
        self.end = end
        self._file = path.open("r+b" if end else "wb")
        self._file.truncate(end)
        self._file.seek(end)
        self._unflushed = 0
        self._thread = ThreadPoolExecutor(1, "flush")
        self._flush: Future[None] | None = None

    def write(self, data: bytes) -> None:
        """Append. Raises OSError, also for an earlier flush that failed."""
        self._file.write(data)
        self.end += len(data)
        self._unflushed += len(data)
        if self._unflushed >= FLUSH_BYTES:
            self._wait()
            self._file.flush()
            self._flush = self._thread.submit(self._sync)
            self._unflushed = 0

    def flush(self) -> None:
        """Hand everything to the system: it outlives this process, not a loss of power. Raises OSError."""
        self._file.flush()

    def finish(self) -> None:
        """Have everything on the disk. Raises OSError."""
        self._wait()
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the thread and close the file."""
        self._thread.shutdown()
        self._file.close()

    def _wait(self) -> None:
        if self._flush is not None:
            self._flush.result()

    def _sync(self) -> None:
        getattr(os, "fdatasync", os.fsync)(self._file.fileno())

"""A folder of cached blobs: hashed, bounded in bytes, written atomically, safe for several processes.

Knows files only. It never raises because of the folder: a cache that cannot be used logs one warning and then
holds nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAGIC = b"pocketllava cache 1\n"
SUFFIX, PART = ".cached", ".part"
STALE_S = 3600.0  # a part file this old belongs to a process that died
DIGEST_BYTES = hashlib.sha256().digest_size


class BlobCache:
    """Name -> bytes. The file's modification time says when it was last used."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._warned: set[str] = set()
        with self._guarded("cannot be used as a cache folder"):
            folder.mkdir(parents=True, exist_ok=True)
            if any(p.suffix not in (SUFFIX, PART) for p in folder.iterdir()):
                self._warn("holds other files too; they are left alone")

    def has(self, name: str) -> bool:
        """Whether there is a file of that name; only get() checks its content."""
        return self._path(name).is_file()

    def get(self, name: str) -> memoryview | None:
        """The bytes put under a name. A damaged file is removed and counts as absent."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except OSError:  # absent, or removed by another process meanwhile
            return None
        start = len(MAGIC) + DIGEST_BYTES
        payload = memoryview(data)[start:]
        if data[:start] != MAGIC + _digest(name, payload):
            logger.warning("%s: damaged; it is made again", path)
            self.discard(name)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return payload

    def put(self, name: str, payload: Any) -> None:
        """Write a buffer under a temporary name, rename it, and drop the oldest files beyond max_bytes."""
        view = memoryview(payload).cast("B")
        if len(view) > self.max_bytes:
            return
        with self._guarded("cannot be written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self.folder, suffix=PART)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.writelines((MAGIC, _digest(name, view), view))
                with self._unless_there(name):
                    Path(part).replace(self._path(name))
            finally:
                with contextlib.suppress(OSError):
                    Path(part).unlink()
            self._prune()

    def discard(self, name: str) -> None:
        """Remove a file, if it is there and may be removed."""
        with contextlib.suppress(OSError):
            self._path(name).unlink()

    @contextlib.contextmanager
    def _unless_there(self, name: str) -> Iterator[None]:
        """Of two processes that write a blob one is enough; Windows replaces none that another one is reading."""
        try:
            yield
        except PermissionError:
            if not self.has(name):
                raise

    def _path(self, name: str) -> Path:
        return self.folder / (name + SUFFIX)

    def _prune(self) -> None:
        """Drop the blobs used longest ago, and what a process that died left; others may be writing theirs."""
        blobs = sorted(self._files(), key=lambda blob: blob[1], reverse=True)
        total = 0
        for path, used, n_bytes in blobs:
            if path.suffix == PART:
                drop = time.time() - used > STALE_S
            else:
                total += n_bytes
                drop = total > self.max_bytes
            if drop:
                with contextlib.suppress(OSError):  # in use elsewhere, or gone already
                    path.unlink()

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        for path in self.folder.iterdir():
            if path.suffix in (SUFFIX, PART):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    yield path, status.st_mtime, status.st_size

    @contextlib.contextmanager
    def _guarded(self, failure: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._warn(f"{failure} ({error.strerror or error}); images are not cached there")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning("%s: %s", self.folder, message)


def _digest(name: str, payload: Any) -> bytes:
    """SHA-256 of name and payload, so that a renamed file is a damaged one."""
    digest = hashlib.sha256(name.encode() + b"\0")
    digest.update(payload)
    return digest.digest()

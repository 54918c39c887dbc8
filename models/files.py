"""Atomic writes: a file is written beside its final path, flushed to the disk, then renamed.

Knows one path; nothing of the content. (Bundles are folders: convert/write/staging.py.)
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to; it replaces `path` when the block ends without an exception.

    An older file under `path` stays until then. Each call has a hidden path of its own. Raises OSError.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield part
        with part.open("r+b") as file:  # a rename can reach the disk before the data does
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def cache_folder() -> Path:
    """This user's cache folder on this platform."""
    return Path(user_cache_path("pocketllava", appauthor=False, ensure_exists=True))


def read_regular(path: Path, max_bytes: int) -> bytes:
    """A regular file's bytes. Raises OSError for a pipe or device, and for a file of more than max_bytes."""
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )  # a pipe would wait to be opened
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "found a pipe, device or folder, expected a regular file")
        if found.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"found {found.st_size} bytes, expected at most {max_bytes}")
        return file.read(max_bytes)

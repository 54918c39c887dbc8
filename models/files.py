"""A file that gets its name when it is whole: written beside its place, on the disk, then renamed.

Knows one path; nothing of what is written. (Bundles are folders: convert/place.py.)
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to; it takes the place of `path` unless an exception comes.

    What was under `path` stays until then. Nobody else is given the same hidden path. Raises OSError.
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
    """Where this user's caches lie on this platform."""
    return Path(user_cache_path("pocketllava", appauthor=False, ensure_exists=True))

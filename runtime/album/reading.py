"""Pictures read, hashed and decoded, in threads while the model answers. Knows files; no album."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pocketllava.album.words import read_tags
from pocketllava.errors import ImageError, InputError
from pocketllava.models.files import read_regular
from pocketllava.types import MAX_FILE_BYTES

AHEAD = 3  # pictures


@dataclass(frozen=True)
class Read:
    """A picture's bytes and their hash, or why there are none; pixels: its fingerprint, or why it has none.

    tags: of its sidecar, where a prompt names them; tags_error: why they cannot be read.
    """

    data: bytes = b""
    sha256: str = ""
    pixels: str = ""
    error: str | None = None
    tags: str = ""
    tags_error: str | None = None


def read(path: str, fingerprint: Callable[[bytes], str], *, with_tags: bool = False) -> Read:
    """A picture. Never raises because of it."""
    try:
        data = read_regular(Path(path), MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        return Read(error=f"cannot be read ({getattr(error, 'strerror', None) or error})")
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        pixels = fingerprint(data)
    except ImageError as error:
        return Read(b"", sha256, error=str(error).removeprefix("image: "))
    try:
        return Read(data, sha256, pixels, tags=read_tags(Path(path)) if with_tags else "")
    except InputError as error:
        return Read(data, sha256, pixels, tags_error=str(error))


def state(path: str) -> os.stat_result | None:
    """What tells a file from an earlier one without opening it; None where it is gone."""
    try:
        return os.stat(path)  # noqa: PTH116 - a million Paths take longer than their files' states
    except (OSError, ValueError):
        return None

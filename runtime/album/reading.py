"""Pictures read, hashed and decoded by threads while the model answers, a few ahead. Knows files; no album."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pocketllava.errors import ImageError
from pocketllava.models.files import read_regular
from pocketllava.types import MAX_FILE_BYTES

THREADS, AHEAD = 2, 3
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Read:
    """A picture's bytes and their hash, or why there are none; pixels: its fingerprint, or why it has none."""

    data: bytes = b""
    sha256: str = ""
    pixels: str = ""
    error: str | None = None


def read(path: str, fingerprint: Callable[[bytes], str]) -> Read:
    """A picture. Never raises because of it."""
    try:
        data = read_regular(Path(path), MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        return Read(error=f"cannot be read ({getattr(error, 'strerror', None) or error})")
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return Read(data, sha256, fingerprint(data))
    except ImageError as error:
        return Read(b"", sha256, error=str(error).removeprefix("image: "))


def ahead(items: Iterable[T], work: Callable[[T], R]) -> Generator[tuple[T, R], None, None]:
    """Each item and work(item), in order; threads work AHEAD of what is asked for."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="pocketllava reader") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > AHEAD:
                    first, done = waiting.popleft()
                    yield first, done.result()
            while waiting:
                first, done = waiting.popleft()
                yield first, done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def state(path: str) -> os.stat_result | None:
    """What tells a file from an earlier one without opening it; None where it is gone."""
    try:
        return os.stat(path)  # noqa: PTH116 - a million Paths take longer than their files' states
    except (OSError, ValueError):
        return None

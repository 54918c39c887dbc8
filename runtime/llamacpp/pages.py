"""Linux's pages of memory while llama.cpp loads a model: a mapped file's are let go of, new buffers get huge ones.

Knows maps, and what llama.cpp logs when; no model.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pocketllava.llamacpp.log import PROGRESS, watched_log

SUPPORTED = sys.platform == "linux"
MADV_DONTNEED = 4  # of a file's map: nothing is lost, the next access reads the page again
MADV_HUGEPAGE = 14
HUGE = 2 << 20  # x86-64's, and AArch64's with small pages of 4 kB
LARGE = 16 * HUGE  # of a map: smaller ones gain nothing
# Logged once such a buffer is allocated, before it is filled. What a batch computes in is never filled: it would grow.
FILLED = re.compile("(?:model|KV) buffer size")


@contextlib.contextmanager
def released_pages(file: Path) -> Iterator[None]:
    """While llama.cpp loads `file` by mapping it: release what was read, each time that it reports progress.

    Beside the map many CPUs compute with a copy of the quantized weights in another order. The map's pages then stay
    resident for nothing: 7.9 GB instead of 5.0 for a 7B model in Q4_K_M. Dropped, they are read again from the page
    cache where a tensor is used in the file's own layout. llama.cpp reports from the thread that loads, between two
    tensors, so that the map cannot go away meanwhile.
    """
    path = str(file.resolve())

    def release(line: str) -> None:
        if line == PROGRESS:
            for start, end, name in _maps():
                if name == path:
                    _madvise(start, end, MADV_DONTNEED)

    with watched_log(release) if SUPPORTED else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """While llama.cpp loads: ask for pages of 2 MB for weights and KV cache, where Linux gives them only if asked.

    Every small page costs the kernel a fault when it is filled, and an address translation with every token that reads
    it (benchmarks/huge_pages.py). "madvise" is Ubuntu's setting of transparent_hugepage/enabled.
    """
    before = set(_blocks()) if SUPPORTED else set()

    def ask(line: str) -> None:
        if FILLED.search(line):
            for block in _blocks():
                if block not in before:
                    _madvise(block * HUGE, (block + 1) * HUGE, MADV_HUGEPAGE)

    with watched_log(ask) if SUPPORTED else contextlib.nullcontext():
        yield


def _blocks() -> Iterator[int]:
    """The numbers of the whole blocks of HUGE bytes in this process's large anonymous maps."""
    for start, end, name in _maps():
        if not name and end - start >= LARGE:
            yield from range(-(-start // HUGE), end // HUGE)


def _maps() -> Iterator[tuple[int, int, str]]:
    """Every map of this process: where it begins and ends, and its file, "" for private memory of its own."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in fields[0].split("-"))
        yield start, end, fields[5] if len(fields) == 6 else ""


def _madvise(start: int, end: int, advice: int) -> None:
    """Linux may refuse, and then all stays as it was."""
    _library().madvise(start, end - start, advice)


@functools.lru_cache(maxsize=1)
def _library() -> Any:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library

"""One question about many images: how many are answered at once, images read ahead, answers in order.

Knows threads and the memory that an answer takes; the engine's work is done by functions it is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pocketllava.models import Bundle
from pocketllava.models.memory import available_bytes, memory

T = TypeVar("T")
R = TypeVar("R")

READERS = 2  # threads, which decode while the model evaluates
AHEAD = 4  # images that wait, preprocessed
MOST_AT_ONCE = {False: 8, True: 16}  # on CPUs, on GPUs: more gained nothing, or not much (benchmarks/README.md)
SHARE = 2  # the part of the free memory that KV caches of further answers may take is one in SHARE


def answers_at_once(bundle: Bundle, n_ctx: int, kv_type: str, *, on_gpu: bool) -> int:
    """How many answers, with n_ctx positions each, are decoded together: what speeds up, and has room."""
    each = memory(bundle, n_ctx, kv_type).kv_cache
    return max(1, min(MOST_AT_ONCE[on_gpu], available_bytes() // SHARE // each))


def read_ahead(items: Iterable[T], read: Callable[[T], None]) -> Iterator[T]:
    """The items, after read(item) is done for each in a thread; AHEAD of them are under way. To be closed."""
    waiting: deque[tuple[T, Future[None]]] = deque()
    with ThreadPoolExecutor(READERS, "pocketllava read ahead") as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(read, item)))
                if len(waiting) > AHEAD:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        finally:
            for _, future in waiting:
                future.cancel()


def _first(waiting: deque[tuple[T, Future[None]]]) -> T:
    item, future = waiting.popleft()
    future.result()
    return item


def in_order(numbered: Iterable[tuple[int, R]]) -> Iterator[R]:
    """What came with the numbers 0, 1, 2, ..., each as soon as those before it are there."""
    early: dict[int, R] = {}
    due = 0
    for number, result in numbered:
        early[number] = result
        while due in early:
            yield early.pop(due)
            due += 1

"""A stream that a thread of its own makes, for callers that must stay free to stop it.

Knows threads and asyncio; what is streamed is not its business. llama.cpp cannot be left in the middle
of a batch by an exception, so the stream is asked to stop, and the thread is waited for.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import closing
from typing import Any, TypeVar

T = TypeVar("T")
WAKE_S = 0.1  # how often a waiting main thread looks for Ctrl-C, which no lock lets through on Windows
_END: Any = object()


def in_background(stream: Callable[..., Iterator[T]], *args: Any, **kwargs: Any) -> Generator[T, None, None]:
    """What stream(*args, should_stop=..., **kwargs) yields. Closing the iterator, or Ctrl-C, stops it and waits."""
    items: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stop, thread = _start(lambda should_stop: stream(*args, should_stop=should_stop, **kwargs), items.put)
    try:
        while (item := _next(items)) is not _END:
            yield _raised(item)
    finally:
        stop.set()
        thread.join()


async def in_background_async(
    stream: Callable[..., Iterator[T]], *args: Any, **kwargs: Any
) -> AsyncGenerator[T, None]:
    """The same for asyncio: the event loop goes on, and aclose() or cancelling the task stops the stream."""
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[Any] = asyncio.Queue()

    def put(item: Any) -> None:
        loop.call_soon_threadsafe(items.put_nowait, item)

    stop, thread = _start(lambda should_stop: stream(*args, should_stop=should_stop, **kwargs), put)
    try:
        while (item := await items.get()) is not _END:
            yield _raised(item)
    finally:
        stop.set()
        await asyncio.shield(loop.run_in_executor(None, thread.join))


class _Raised:
    """An exception on its way from the thread to the caller."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _start(
    stream: Callable[[Callable[[], bool]], Any], put: Callable[[Any], None]
) -> tuple[threading.Event, threading.Thread]:
    stop = threading.Event()

    def work() -> None:
        try:
            with closing(stream(stop.is_set)) as items:
                for item in items:
                    put(item)
        except BaseException as error:
            put(_Raised(error))
        finally:
            put(_END)

    thread = threading.Thread(target=work, name="pocketllava stream", daemon=True)
    thread.start()
    return stop, thread


def _next(items: queue.SimpleQueue[Any]) -> Any:
    while True:
        try:
            return items.get(timeout=WAKE_S)
        except queue.Empty:
            continue


def _raised(item: Any) -> Any:
    if isinstance(item, _Raised):
        raise item.error
    return item

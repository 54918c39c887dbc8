"""One question about many images: how many are answered at once, images read ahead, answers in order.

Knows threads and the memory that an answer takes; the engine's work is done by functions it is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pocketllava.errors import EngineDied, ImageError, InputError, PocketLlavaError
from pocketllava.models import Bundle
from pocketllava.models.machine import available_bytes
from pocketllava.models.memory import memory
from pocketllava.types import Answer, ImageSource, Message, conversation

if TYPE_CHECKING:
    from pocketllava.engine.batched import Job
    from pocketllava.llamacpp.guard import ShouldStop

T = TypeVar("T")
R = TypeVar("R")

READERS = 2  # threads, which decode while the model evaluates
AHEAD = 4  # images that wait, preprocessed
MAX_AT_ONCE = 256  # LLAMA_MAX_SEQ
# x86's kernels for Q4_K unpack a weight once for so many rows (ggml-cpu/arch/x86/repack.cpp)
MOST_AT_ONCE = 16
ROWS = 4  # that they take together else; those left over are taken one by one (ggml-cpu/repack.cpp)
SHARE = 2  # the part of the free memory that KV caches of further answers may take is one in SHARE


@dataclass(frozen=True)
class Question:
    """What is asked about every image."""

    text: str
    system: str | None

    def __post_init__(self) -> None:
        conversation(None, self.text, self.system)  # raises InputError

    def about(self, image: ImageSource | None) -> list[Message]:
        """The conversation. Raises ImageError for several images."""
        if isinstance(image, list | tuple):
            raise ImageError(f"image: found {len(image)} together, expected one; ask() takes several")
        return conversation(image, self.text, self.system)

    def jobs(self, images: Iterable[ImageSource]) -> Iterator[Job]:
        """A numbered conversation about each image, or what is wrong with it."""
        for number, image in enumerate(images):
            try:
                yield number, self.about(image)
            except PocketLlavaError as error:
                yield number, error.with_traceback(None)


def answers_at_once(bundle: Bundle, n_ctx: int) -> int:
    """How many answers, with n_ctx positions each, are decoded together: what speeds up, and has room."""
    each = memory(bundle, n_ctx, "f16").kv_cache
    n = min(MOST_AT_ONCE, available_bytes() // SHARE // each)
    return n - n % ROWS if n > ROWS else max(1, n)


def read_ahead(items: Iterable[T], read: Callable[[T], None]) -> Generator[T, None, None]:
    """The items, after read(item) is done for each in a thread. To be closed."""
    with closing(results_ahead(items, read)) as results:
        for item, _ in results:
            yield item


def results_ahead(
    items: Iterable[T], work: Callable[[T], R], ahead: int = AHEAD
) -> Generator[tuple[T, R], None, None]:
    """Each item and work(item), in order; threads work so many ahead of what is asked for. To be closed.

    What the items' iterator raises comes after what it gave.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    following, error = iter(items), None
    with ThreadPoolExecutor(READERS, "pocketllava reader") as pool:
        try:
            while error is None:
                try:
                    item = next(following)
                except Exception as stopped:  # the end, or the caller's own: what was taken comes first
                    error = stopped
                else:
                    waiting.append((item, pool.submit(work, item)))
                    if len(waiting) > ahead:
                        yield _first(waiting)
            while waiting:
                yield _first(waiting)
        finally:
            for _, future in waiting:
                future.cancel()
    if not isinstance(error, StopIteration):
        raise error


def one_by_one(
    ask: Callable[[ImageSource], Answer], images: Iterable[ImageSource], should_stop: ShouldStop | None
) -> Iterator[Answer | PocketLlavaError]:
    """ask(image) of each, or what is wrong with it, until one is cancelled. Raises StateError, BackendError."""
    for image in images:
        if should_stop is not None and should_stop():
            return
        try:
            result: Answer | PocketLlavaError = ask(image)
        except (InputError, EngineDied) as error:
            result = error.with_traceback(None)  # which would keep the image
        yield result
        if isinstance(result, Answer) and result.finish_reason == "cancelled":
            return


def _first(waiting: deque[tuple[T, Future[R]]]) -> tuple[T, R]:
    item, future = waiting.popleft()
    return item, future.result()


def in_order(numbered: Iterable[tuple[int, R]]) -> Iterator[R]:
    """What came with the numbers 0, 1, 2, ..., each as soon as those before it are there."""
    early: dict[int, R] = {}
    due = 0
    for number, result in numbered:
        early[number] = result
        while due in early:
            yield early.pop(due)
            due += 1

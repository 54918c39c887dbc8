"""One answer after the other from a model, in the order of their jobs. The one place that asks.

Knows Llava; no album. A loop is noticed while it is written, ended there, and asked once more with a repeat penalty.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

from pocketllava.album.quality import RETRY_PENALTY, LoopFinder
from pocketllava.errors import BackendError, ContextOverflow, ImageError, InputError
from pocketllava.llava import Llava
from pocketllava.types import Answer, Message, Options

MAX_FAILURES = (
    3  # of the engine, or of a prompt's length, in a row, after which it is not the picture's fault
)
ShouldStop = Callable[[], bool]


@dataclass(frozen=True)
class Job:
    """A question about a picture. context: whatever the caller wants to find again."""

    image: bytes
    question: str
    context: Any


@dataclass(frozen=True)
class Reply:
    """An answer as an album keeps it."""

    text: str
    tokens: int
    finish_reason: str
    seconds: float
    looped: bool = False
    retried: bool = False


def whole_text(text: str, options: Options) -> str:
    """An answer with its beginning, where options.prefill gave one."""
    begun = (options.prefill or "").strip()
    return (options.prefill or "").rstrip() + text if begun else text


def replies(
    llava: Llava, jobs: Iterable[Job], options: Options, should_stop: ShouldStop
) -> Iterator[tuple[Job, Reply | InputError | BackendError]]:
    """Each job with its reply or its picture's error; ends without a further one once should_stop() is true.

    Raises what is not a picture's fault. Jobs are asked for one at a time, when the one before is done.
    """
    failures = 0
    for job in jobs:
        try:
            reply = _asked(llava, job, options, should_stop)
        except (ImageError, ContextOverflow, BackendError) as error:
            failures = 0 if isinstance(error, ImageError) else failures + 1
            if failures >= MAX_FAILURES:
                raise
            yield job, error
            continue
        if reply is None:
            return
        failures = 0
        yield job, reply


def together(
    llava: Llava,
    jobs: Iterable[Job],
    question: str,
    options: Options,
    batch: int | Literal["auto"],
    should_stop: ShouldStop,
) -> Iterator[tuple[Job, Reply | InputError | BackendError]]:
    """The same of one question about all pictures, several answers decoded at once."""
    pending: deque[Job] = deque()

    def images() -> Iterator[bytes]:
        for job in jobs:
            pending.append(job)
            yield job.image

    results = llava.ask_many(images(), question, batch=batch, options=options, should_stop=should_stop)
    with closing(results):  # type: ignore[type-var]
        for result in results:
            job = pending.popleft()
            if isinstance(result, Answer):
                reply = _checked(llava, job, result, options, should_stop)
                if reply is None:
                    return
                yield job, reply
            elif isinstance(result, InputError | BackendError):
                yield job, result


def _checked(
    llava: Llava, job: Job, answer: Answer, options: Options, should_stop: ShouldStop
) -> Reply | None:
    """An answer that runs in a loop is asked for once more, as _asked does. None if it was stopped."""
    if answer.finish_reason == "cancelled":
        return None
    timings = answer.timings
    seconds = timings.first_token_s + timings.decode_s
    loop = LoopFinder()
    looped = options.schema is None and options.choices is None and loop.add(answer.token_ids)
    first = Reply(answer.text, len(answer.token_ids), answer.finish_reason, seconds, looped)
    if not looped or options.repeat_penalty >= RETRY_PENALTY:
        return first
    second = _streamed(llava, job, replace(options, repeat_penalty=RETRY_PENALTY), should_stop)
    if second is None:
        return None
    return replace(first if second.looped else second, seconds=seconds + second.seconds, retried=True)


def _asked(llava: Llava, job: Job, options: Options, should_stop: ShouldStop) -> Reply | None:
    """The reply, None if it was stopped."""
    first = _streamed(llava, job, options, should_stop)
    if first is None or not first.looped or options.choices or options.repeat_penalty >= RETRY_PENALTY:
        return first
    second = _streamed(llava, job, replace(options, repeat_penalty=RETRY_PENALTY), should_stop)
    if second is None:
        return None
    best = first if second.looped else second
    return replace(best, seconds=first.seconds + second.seconds, retried=True)


def _streamed(llava: Llava, job: Job, options: Options, should_stop: ShouldStop) -> Reply | None:
    start, text, tokens, reason = time.perf_counter(), "", 0, ""
    loop = LoopFinder()
    messages = [Message("user", job.question, job.image)]
    with closing(llava.stream(messages, options=options, should_stop=should_stop)) as chunks:  # type: ignore[type-var]
        for chunk in chunks:
            text, tokens = text + chunk.text, tokens + len(chunk.token_ids)
            reason = chunk.finish_reason or reason
            # records repeat their keys, and choices are not sampled
            if loop.add(chunk.token_ids) and options.schema is None and options.choices is None:
                break
    if reason == "cancelled":
        return None
    looped = loop.found and options.choices is None and (options.schema is None or reason == "length")
    return Reply(text, tokens, reason or "repetition", time.perf_counter() - start, looped)

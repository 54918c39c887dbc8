"""Streams in other threads and in asyncio: nothing mixes, and stopping stops within a token."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pictures
import pytest

from pocketllava import ImageError, InputError, Llava, Message, Options
from pocketllava.engine.background import in_background, in_background_async

SHORT = Options(max_tokens=4)
LONG = Options(max_tokens=400)
QUESTIONS = [f"Question {n}?" for n in range(6)]
A = pictures.four()[0]


def counting(made: list[int], error: Exception | None = None) -> Callable[..., Iterator[int]]:
    """A stream that notes what it made, and ends when it is asked to."""

    def stream(*, should_stop: Callable[[], bool]) -> Iterator[int]:
        for n in range(1000):
            if should_stop():
                return
            made.append(n)
            yield n
            time.sleep(0.001)
            if error is not None and n == 3:
                raise error

    return stream


def test_a_background_stream_gives_everything_and_its_errors() -> None:
    made: list[int] = []
    got: list[int] = []
    with pytest.raises(ValueError, match="broken"):
        got.extend(in_background(counting(made, ValueError("broken"))))
    stream = in_background(counting(made, ValueError("broken")))
    assert [next(stream) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def test_closing_a_background_stream_stops_its_thread() -> None:
    made: list[int] = []
    before = threading.active_count()
    stream = in_background(counting(made))
    next(stream)
    stream.close()
    n = len(made)
    assert threading.active_count() == before
    assert n < 100
    time.sleep(0.02)
    assert len(made) == n


def test_a_stopped_answer_says_so(llava: Llava) -> None:
    """The second question to `should_stop` after the first token ends the answer before the next one."""
    chunks: list[Any] = []
    for chunk in llava.stream(
        [Message("user", "Count.")], options=LONG, should_stop=lambda: len(chunks) >= 2
    ):
        chunks.append(chunk)
    assert [len(chunk.token_ids) for chunk in chunks] == [1, 1, 0]
    assert chunks[-1].finish_reason == "cancelled"
    assert chunks[-1].timings.answer_tokens == 2


def test_ctrl_c_in_the_caller_stops_the_worker_and_leaves_the_model_right(llava: Llava) -> None:
    expected = llava.ask(A, "What is it?", options=SHORT).token_ids
    stream = in_background(llava.stream, [Message("user", "Count.", (A,))], options=LONG)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert llava.ask(A, "What is it?", options=SHORT).token_ids == expected


def test_asyncio_gets_the_same_answer(llava: Llava) -> None:
    turns = [Message("user", "What is it?", (A,))]
    expected = llava.chat(turns, options=SHORT)

    async def answer() -> list[Any]:
        return [chunk async for chunk in llava.astream(turns, options=SHORT)]

    chunks = asyncio.run(answer())
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert chunks[-1].finish_reason == expected.finish_reason


def test_the_event_loop_stays_free(llava: Llava) -> None:
    async def ticks() -> int:
        n, running = 0, True

        async def tick() -> None:
            nonlocal n
            while running:
                n += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        llava.clear_cache()
        async for _ in llava.astream([Message("user", "What is it?", (A,))], options=LONG):
            pass
        running = False
        await ticking
        return n

    assert asyncio.run(ticks()) > 10


def test_closing_an_async_stream_stops_within_a_token(llava: Llava) -> None:
    async def stopped() -> int:
        stream = llava.astream([Message("user", "Count.")], options=LONG)
        await anext(stream)
        await stream.aclose()
        return n_tokens()

    def n_tokens() -> int:
        with llava.session() as session:
            return session.text.n_tokens

    n = asyncio.run(stopped())
    time.sleep(0.05)
    assert n_tokens() == n  # nothing goes on
    assert n < 200


def test_cancelling_a_task_stops_prompt_evaluation(llava: Llava) -> None:
    llava.clear_cache()
    llava.ask(A, "What is it?", options=SHORT)
    expected = llava.ask(A, "Again?", options=SHORT).token_ids

    async def cancelled() -> None:
        llava.clear_cache()
        task = asyncio.create_task(collect(llava, A))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert llava.ask(A, "Again?", options=SHORT).token_ids == expected


async def collect(llava: Llava, picture: bytes, question: str = "What is it?") -> tuple[int, ...]:
    """An answer's token ids."""
    turns = [Message("user", question, (picture,))]
    return tuple([i async for chunk in llava.astream(turns, options=SHORT) for i in chunk.token_ids])


def test_async_errors_come_where_they_belong(llava: Llava) -> None:
    with pytest.raises(ImageError):
        asyncio.run(collect(llava, b"nonsense"))
    with pytest.raises(InputError, match=r"messages\[0\]: found str, expected a Message or a dict"):
        llava.astream(["Hello"])  # type: ignore[list-item]


def test_threads_and_tasks_do_not_mix(llava: Llava) -> None:
    """Six threads and six tasks at once, each with its own picture and question, some giving up."""
    jobs = [(picture, question) for question in QUESTIONS for picture in pictures.four()[:2]]
    expected = {job: llava.ask(*job, options=SHORT).token_ids for job in jobs}
    found: dict[Any, Any] = {}

    def work(n: int) -> None:
        order = random.Random(n).sample(jobs, 4)
        for job in order:
            if n % 3 == 2:
                with_closing = in_background(llava.stream, [Message("user", job[1], (job[0],))], options=LONG)
                next(with_closing)
                with_closing.close()
            else:
                found[n, job] = llava.ask(*job, options=SHORT).token_ids

    async def together() -> None:
        answers = await asyncio.gather(*(collect(llava, *job) for job in jobs[:6]))
        found.update({("task", job): answer for job, answer in zip(jobs[:6], answers, strict=True)})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    asyncio.run(together())
    for thread in threads:
        thread.join()
    assert len(found) == 6 + 4 * 4
    assert {key: answer for key, answer in found.items() if answer != expected[key[1]]} == {}


def test_an_abandoned_async_stream_is_harmless() -> None:
    made: list[int] = []

    async def abandon() -> None:
        stream = in_background_async(counting(made))
        await anext(stream)
        del stream
        gc.collect()
        await asyncio.sleep(0.05)

    asyncio.run(abandon())
    assert len(made) < 100

"""The public door: sampling by keyword, OpenAI's messages, asyncio, the queue, and calls that come too late."""

from __future__ import annotations

import asyncio
import doctest
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pictures
import pytest

import pocketllava
from pocketllava import Bundle, InputError, Llava, Message, Options, StateError, UnsupportedOption, types
from pocketllava.models.demo.picture import drawn_picture

A = pictures.four()[0]
SHORT = Options(max_tokens=4)
QUESTION = [Message("user", "What is it?", A)]


def test_sampling_by_keyword_is_sampling_by_options(llava: Llava) -> None:
    options = Options(max_tokens=6, temperature=1.0, seed=3, top_k=20, min_p=0.05)
    expected = llava.ask(A, "What is it?", options=options).token_ids
    by_name = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "top_k": 20, "min_p": 0.05}
    assert llava.ask(A, "What is it?", **by_name).token_ids == expected
    assert llava.chat(QUESTION, options=Options(max_tokens=99, seed=3), **by_name).token_ids == expected
    assert [i for c in llava.stream(QUESTION, **by_name) for i in c.token_ids] == list(expected)
    assert asyncio.run(llava.aask(A, "What is it?", **by_name)).token_ids == expected
    assert asyncio.run(llava.achat(QUESTION, options=options)).token_ids == expected


def test_penalties_and_min_p_change_what_is_sampled(llava: Llava) -> None:
    greedy = llava.ask(None, "Go on.", max_tokens=60).token_ids
    penalized = llava.ask(None, "Go on.", max_tokens=60, repeat_penalty=1.5).token_ids
    assert len(set(penalized)) > len(set(greedy))
    likeliest = llava.ask(None, "Go on.", max_tokens=10, temperature=2.0, seed=1, min_p=1.0).token_ids
    assert likeliest == greedy[:10]
    assert llava.ask(None, "Go on.", max_tokens=10, temperature=2.0, seed=1).token_ids != greedy[:10]


def test_openais_messages_and_open_files_are_taken(llava: Llava) -> None:
    import base64

    uri = "data:image/png;base64," + base64.b64encode(A).decode()
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": uri}}]
    request = [{"role": "user", "content": parts}]
    expected = llava.chat(QUESTION, options=SHORT)
    assert llava.chat(request, options=SHORT).token_ids == expected.token_ids
    assert llava.ask(io.BytesIO(A), "What is it?", options=SHORT).token_ids == expected.token_ids
    assert llava.count_tokens(request) == expected.usage.prompt_tokens
    assert llava.prefill(io.BytesIO(A), after=[{"role": "system", "content": "Be brief."}]).wait()
    features = llava.image_features(io.BytesIO(A))
    assert features.shape == llava.image_features(A).shape


def test_usage_counts_what_was_cached(llava: Llava) -> None:
    llava.clear_cache()
    first = llava.ask(A, "What is it?", options=SHORT).usage
    second = llava.ask(A, "What is it?", options=SHORT).usage
    assert (first.image_tokens, first.cached_tokens) == (576, 0)
    assert 576 < second.cached_tokens == second.prompt_tokens == first.prompt_tokens
    assert first.total_tokens == first.prompt_tokens + first.completion_tokens


def test_prepare_is_the_old_name_of_prefill() -> None:
    assert Llava.prepare is Llava.prefill


WRONG: list[tuple[Callable[[Llava], Any], str]] = [
    (lambda m: m.ask(A, "a", max_token=5), "^max_token: no such option, did you mean 'max_tokens'"),
    (lambda m: m.ask(A, "a", max_tokens=2.5), "^max_tokens: found 2.5"),
    (lambda m: m.ask(A, 5), "^message text: found int"),  # type: ignore[arg-type]
    (lambda m: m.ask(A, "a", options={"max_tokens": 5}), "^options: found dict"),  # type: ignore[arg-type]
    (lambda m: m.ask(5, "a"), "^image: found int"),  # type: ignore[arg-type]
    (lambda m: m.chat("Hello."), "^messages: found one str"),  # type: ignore[arg-type]
    (lambda m: m.chat([]), "^conversation: found no messages"),
    (lambda m: m.stream(QUESTION, should_stop=True), "^should_stop: found True"),  # type: ignore[arg-type]
    (lambda m: m.stream(QUESTION, stop=lambda: True), "^stop: found a function"),
    (lambda m: m.stream([{"role": "user", "content": 5}]), r"^messages\[0\]: content: found int"),
    (lambda m: m.astream(QUESTION, top_p=2), "^top_p: found 2"),
    (lambda m: m.stream(QUESTION, queue_timeout_s=-1), "^queue_timeout_s: found -1"),
    (lambda m: m.astream(QUESTION, queue_timeout_s="5"), "^queue_timeout_s: found '5'"),  # type: ignore[arg-type]
    (lambda m: m.prefill(A, after="Hello."), "^messages: found one str"),  # type: ignore[arg-type]
    (lambda m: m.image_features([A, A]), "^image: found 2 images, expected one"),  # type: ignore[arg-type]
    (lambda m: m.count_tokens([5]), r"^messages\[0\]: found int"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_arguments_are_checked_when_they_are_given(
    llava: Llava, call: Callable[[Llava], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(llava)


def test_loading_checks_its_options_before_anything_is_opened() -> None:
    with pytest.raises(UnsupportedOption, match=r"^n_ctx: found '2048', expected None or a whole number"):
        Llava.load("nowhere", n_ctx="2048")
    with pytest.raises(UnsupportedOption, match=r"^n_gpu_layer: no such option, did you mean 'n_gpu_layers'"):
        Llava.load("nowhere", n_gpu_layer=0)


def members() -> list[str]:
    """Public names of Llava that use the model."""
    return [n for n in dir(Llava) if not n.startswith("_") and n not in ("load", "plan", "close")]


LATE: dict[str, Callable[[Llava], Any]] = {
    "ask_many": lambda llava: llava.ask_many([b""], "Why?"),
    "aask": lambda m: asyncio.run(m.aask(A, "a")),
    "achat": lambda m: asyncio.run(m.achat(QUESTION)),
    "ask": lambda m: m.ask(A, "a"),
    "astream": lambda m: m.astream(QUESTION),
    "chat": lambda m: m.chat(QUESTION),
    "clear_cache": lambda m: m.clear_cache(),
    "count_tokens": lambda m: m.count_tokens(QUESTION),
    "devices": lambda m: m.devices,
    "fingerprint": lambda m: m.fingerprint(A),
    "image_features": lambda m: m.image_features(A),
    "loaded": lambda m: m.loaded,
    "n_ctx": lambda m: m.n_ctx,
    "prefill": lambda m: m.prefill(A),
    "prepare": lambda m: m.prepare(A),
    "session": lambda m: m.session().__enter__(),
    "stream": lambda m: m.stream(QUESTION),
    "trace": lambda m: m.trace(A, "a"),
    "unload": lambda m: m.unload(),
    "view": lambda m: m.view(A),
}


def test_after_close_every_member_is_a_state_error(bundle: Bundle) -> None:
    assert sorted(LATE) == members()
    llava = Llava.load(bundle.folder)
    begun = llava.stream([Message("user", "Hello?")], options=SHORT)
    next(begun)
    unread = llava.stream([Message("user", "Hello?")], options=SHORT)
    llava.close()
    llava.close()
    for name, call in LATE.items():
        with pytest.raises(StateError, match=r"^model: used after close\(\); load it again$"):
            pytest.fail(f"{name}: {call(llava)}")
    for stream in (begun, unread):
        with pytest.raises(StateError):
            next(stream)


FORKED = """
import os, sys
from pocketllava import Llava, StateError
llava = Llava.load(sys.argv[1])
if os.fork() == 0:
    for call in (lambda: llava.ask(None, "a"), lambda: llava.n_ctx, lambda: llava.prefill(b"")):
        try:
            call()
        except StateError as error:
            print(error, flush=True)
    llava.close()
    os._exit(0)
os.wait()
print(llava.ask(None, "What?", max_tokens=2).finish_reason, os.getpid())
llava.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_a_child_of_fork_gets_a_state_error_and_the_parent_goes_on(bundle: Bundle) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(bundle.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    *refused, answered = done.stdout.splitlines()
    assert len(refused) == 3
    parent = answered.split()[1]
    assert all(line.startswith(f"model: loaded by process {parent}, used in its child ") for line in refused)
    assert answered.startswith("length")


def test_a_call_waits_no_longer_than_its_queue_timeout(llava: Llava) -> None:
    stream = llava.stream([Message("user", "Go on.")], max_tokens=50)
    next(stream)
    errors: list[BaseException] = []

    def ask(timeout_s: float) -> None:
        start = time.monotonic()
        try:
            llava.ask(None, "Now?", options=SHORT, queue_timeout_s=timeout_s)
        except StateError as error:
            errors.append(error)
            assert timeout_s <= time.monotonic() - start < timeout_s + 5

    for timeout_s in (0, 0.3):
        other = threading.Thread(target=ask, args=(timeout_s,))
        other.start()
        other.join()
    assert [str(error).split(" (")[0] for error in errors] == [
        "model: still busy with another call after 0 s",
        "model: still busy with another call after 0.3 s",
    ]
    assert sum(len(chunk.token_ids) for chunk in stream) > 0  # the stream was not disturbed
    assert llava.ask(None, "Now?", options=SHORT, queue_timeout_s=0).timings.queue_s < 1


def test_the_wait_for_other_calls_is_timed(llava: Llava) -> None:
    stream = llava.stream([Message("user", "Go on.")], max_tokens=50)
    next(stream)
    answers: list[Any] = []
    other = threading.Thread(target=lambda: answers.append(llava.ask(None, "Now?", options=SHORT)))
    other.start()
    time.sleep(0.3)
    for _ in stream:
        pass
    other.join()
    assert 0.2 < answers[0].timings.queue_s <= answers[0].timings.first_token_s


def test_an_answer_that_is_cancelled_while_it_waits_says_so(llava: Llava) -> None:
    stream = llava.stream([Message("user", "Go on.")], max_tokens=50)
    next(stream)
    asked_at = time.monotonic()
    chunks: list[Any] = []
    other = threading.Thread(
        target=lambda: chunks.extend(
            llava.stream(QUESTION, should_stop=lambda: time.monotonic() > asked_at + 0.2)
        )
    )
    other.start()
    other.join(timeout=60)
    assert [(c.text, c.finish_reason) for c in chunks] == [("", "cancelled")]
    timings = chunks[0].timings
    assert timings.queue_s >= 0.2
    assert (timings.prompt_tokens, timings.devices, timings.load_s) == (0, llava.devices, llava.load_s)
    stream.close()  # type: ignore[attr-defined]


def test_an_answer_that_is_cancelled_in_its_prompt_counts_its_work(llava: Llava) -> None:
    for n_calls in (1, 5):
        llava.clear_cache()
        countdown = iter(range(n_calls))

        def should_stop(left: Iterator[int] = countdown) -> bool:
            return next(left, None) is None

        [chunk] = llava.stream(
            [Message("user", "Describe it. " * 20, pictures.png(pictures.scene(60 + n_calls, 50)))],
            should_stop=should_stop,
        )
        assert chunk.finish_reason == "cancelled"
        assert chunk.timings
        assert chunk.timings.image_tokens == 576 < chunk.timings.prompt_tokens
        assert chunk.timings.preprocess_s > 0
        assert (chunk.timings.answer_tokens, chunk.timings.first_token_s) == (0, 0.0)


def test_cancelling_a_task_that_waits_for_its_turn(llava: Llava) -> None:
    stream = llava.stream([Message("user", "Go on.")], max_tokens=50)
    next(stream)

    async def wait() -> None:
        await asyncio.wait_for(llava.aask(None, "Now?", options=SHORT), timeout=0.3)

    start = time.monotonic()
    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        asyncio.run(wait())
    assert time.monotonic() - start < 30
    stream.close()  # type: ignore[attr-defined]


def test_the_examples_in_docstrings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scene.png").write_bytes(Path(drawn_picture()).read_bytes())
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    with Llava.load("demo") as llava:
        names = {**vars(pocketllava), "llava": llava, "asyncio": asyncio}
        tests = [t for module in (pocketllava.llava, types) for t in finder.find(module, globs=dict(names))]
        for test in tests:
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    with_examples = {test.name.split(".")[-1] for test in tests if test.examples}
    assert with_examples >= {
        "Llava", "load", "ask", "chat", "stream", "astream", "prefill", "image_features", "count_tokens", "Message",
        "Options",
    }  # fmt: skip


LIGHT = """
import sys
before = set(sys.modules)
import pocketllava
print(*sorted(m for m in set(sys.modules) - before if m.startswith("pocketllava")))
from pocketllava import *
assert all(name in globals() for name in pocketllava.__all__)
assert set(pocketllava.__all__) <= set(dir(pocketllava))
assert not {"asyncio", "numpy", "PIL", "llama_cpp", "click"} & set(sys.modules)
"""


def test_public_names_are_imported_when_they_are_used() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("pocketllava pocketllava.version\n", "")
    with pytest.raises(AttributeError, match="module 'pocketllava' has no attribute 'Lava'"):
        pocketllava.Lava  # noqa: B018

"""A model in a child process behaves as one in this process, and its end is an error, not this process's end."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from pocketllava import (
    BundleError,
    Chunk,
    ContextOverflow,
    EngineDied,
    ImageError,
    InputError,
    Llava,
    Message,
    ModelNotFound,
    Options,
    PocketLlavaError,
    Progress,
    UnsupportedOption,
)
from pocketllava.engine import process
from pocketllava.models.demo.picture import drawn_picture

LONG = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 60}  # an answer that takes a while
QUESTION = "What is at the center?"


@pytest.fixture(scope="module")
def picture() -> bytes:
    return drawn_picture().read_bytes()


@pytest.fixture(scope="module")
def here() -> Iterator[Llava]:
    with Llava.load("demo", n_ctx=512) as model:
        yield model


@pytest.fixture(scope="module")
def isolated() -> Iterator[Llava]:
    with Llava.load("demo", n_ctx=512, isolated=True) as model:
        yield model


def child_of(_model: Llava) -> psutil.Process:
    """The child of this process that started last."""
    return max(psutil.Process().children(), key=lambda p: p.create_time())


def stoppable(model: Llava, picture: bytes) -> tuple[Iterator[Chunk], threading.Event]:
    """A long answer, and what cancels it."""
    stop = threading.Event()
    messages = [Message(text="Describe the image.", images=picture)]
    return model.stream(messages, max_tokens=200, schema=LONG, should_stop=stop.is_set), stop


def test_answers_are_those_of_a_model_in_this_process(here: Llava, isolated: Llava, picture: bytes) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    for image in (picture, Image.fromarray(pixels), pixels, None):
        expected, found = (m.ask(image, QUESTION, max_tokens=12) for m in (here, isolated))
        assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
        assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    turns = [
        Message("user", QUESTION, picture),
        Message("assistant", "A thing."),
        Message("user", "How many?"),
    ]
    assert here.chat(turns).token_ids == isolated.chat(turns).token_ids
    sampled = Options(max_tokens=8, temperature=1.0, seed=3, top_logprobs=2)
    expected, found = (m.ask(picture, QUESTION, options=sampled) for m in (here, isolated))
    assert found.logprobs == expected.logprobs
    options = Options(choices=("yes", "no"))
    assert (
        here.ask(picture, "Is it red?", options=options).choices
        == isolated.ask(picture, "Is it red?", options=options).choices
    )


def test_a_stream_s_chunks_are_the_same_though_they_travel_together(
    here: Llava, isolated: Llava, picture: bytes
) -> None:
    messages = [Message(text="Describe the image.", images=picture)]
    options = Options(max_tokens=200, schema=LONG)
    expected, found = (
        [(chunk.text, chunk.token_ids, chunk.finish_reason) for chunk in m.stream(messages, options=options)]
        for m in (here, isolated)
    )
    assert found == expected
    assert len(found) > 60  # one for each token: a pipe's frame holds many of them


def test_everything_else_is_the_same(here: Llava, isolated: Llava, picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "scene.png").write_bytes(picture)
    path = tmp_path / "scene.png"
    assert np.array_equal(here.image_features(path), isolated.image_features(path))
    assert here.view(picture).tobytes() == isolated.view(picture).tobytes()
    messages = [Message(text=QUESTION, images=path)]
    assert here.count_tokens(messages) == isolated.count_tokens(messages)
    assert here.trace(path, QUESTION) == isolated.trace(path, QUESTION)
    assert here.devices == isolated.devices
    assert here.n_ctx == isolated.n_ctx
    isolated.clear_cache()
    assert isolated.prefill(path).wait()
    answer = isolated.ask(path, QUESTION, max_tokens=4)
    assert answer.usage.cached_tokens >= answer.usage.image_tokens
    assert asyncio.run(isolated.aask(path, QUESTION, max_tokens=4)).text == answer.text


def test_a_preparation_that_is_cancelled_ends_alone(isolated: Llava, picture: bytes) -> None:
    """In the middle of prompt evaluation, where an interruption carries what was evaluated."""
    child = child_of(isolated)
    for n in range(5):
        turns = [Message("user", f"{n} " + "word " * 60), Message("assistant", "Yes.")]
        preparation = isolated.prefill(picture, after=turns)
        while preparation.progress is None and not preparation.done:
            time.sleep(0.0005)
        preparation.cancel()
        preparation.wait(20)
        assert preparation.done
    assert child_of(isolated) == child


@pytest.mark.skipif(os.name == "nt", reason="SIGSTOP")
def test_a_child_that_never_began_with_a_call_is_replaced(isolated: Llava, picture: bytes) -> None:
    """It was ending when the call came: the call cannot be what ended it, so it is not lost."""
    expected = isolated.ask(picture, QUESTION, max_tokens=8).token_ids
    child = child_of(isolated)
    child.suspend()
    killer = threading.Timer(0.3, child.kill)
    killer.start()
    assert isolated.ask(picture, QUESTION, max_tokens=8).token_ids == expected
    killer.join()
    assert child_of(isolated) != child


PROGRAM = """
import os, sys
import numpy as np
from PIL import Image
from pocketllava import ImageError, Llava

class Array(np.ndarray): ...
class Picture(Image.Image): ...
class Place:
    def __fspath__(self): return os.fsencode(sys.argv[1])

pixels = np.asarray(Image.open(sys.argv[1]).convert("RGB"))
picture = Picture()
picture.__setstate__(Image.fromarray(pixels).__getstate__())
picture.info["note"] = Place()
with Llava.load("demo", n_ctx=512, isolated=True) as model:
    for image in (sys.argv[1], pixels.view(Array), picture, Place()):
        print(model.ask(image, "What is at the center?", max_tokens=8).text, flush=True)
    for image in (np.full((4, 4, 3), Place()), Place):
        try:
            model.ask(image, "What is it?")
        except ImageError:
            print("refused")
"""


def test_classes_of_the_caller_s_program_stay_there(picture: bytes, tmp_path: Path) -> None:
    (tmp_path / "scene.png").write_bytes(picture)
    (tmp_path / "program.py").write_text(PROGRAM, "utf-8")
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "scene.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    *answers, first, second = done.stdout.splitlines() or [done.stderr, "", ""]
    assert (first, second) == ("refused", "refused"), done.stderr
    assert answers == [answers[0]] * 4


def test_relative_paths_are_this_process_s(
    isolated: Llava, picture: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.png").write_bytes(picture)
    monkeypatch.chdir(tmp_path)
    assert isolated.ask("here.png", QUESTION, max_tokens=4).text


@pytest.mark.parametrize(
    ("image", "options"),
    [
        ("nowhere.png", {}),
        (b"no picture", {}),
        ("demo", {"max_tokens": 1, "schema": {"type": "object", "not": {}}}),
    ],
)
def test_errors_are_the_same(
    here: Llava, isolated: Llava, picture: bytes, image: Any, options: dict[str, Any]
) -> None:
    errors = []
    for model in (here, isolated):
        with pytest.raises(PocketLlavaError) as caught:
            model.ask(picture if image == "demo" else image, QUESTION, **options)
        errors.append(caught.value)
    assert type(errors[0]) is type(errors[1])
    assert str(errors[0]) == str(errors[1])


def test_an_overflow_keeps_its_fields(here: Llava, isolated: Llava, picture: bytes) -> None:
    found = []
    for model in (here, isolated):
        with pytest.raises(ContextOverflow) as caught:
            model.ask([picture] * 20, QUESTION)
        assert not isinstance(caught.value, ImageError)
        found.append(pickle.loads(pickle.dumps(caught.value)).__dict__)
    assert found[0] == found[1]


def test_loading_raises_what_it_raises_here(tmp_path: Path) -> None:
    for path in ("no such model", tmp_path):
        with pytest.raises((ModelNotFound, BundleError)) as here:
            Llava.load(path)
        with pytest.raises(type(here.value)) as isolated:
            Llava.load(path, isolated=True)
        assert str(here.value) == str(isolated.value)
    with pytest.raises(UnsupportedOption, match="n_ctx"):
        Llava.load("demo", n_ctx=10**6, isolated=True)


def test_progress_and_the_engine_itself(isolated: Llava, picture: bytes) -> None:
    isolated.clear_cache()
    seen: list[Progress] = []
    messages = [Message(text=QUESTION, images=picture)]
    list(isolated.stream(messages, max_tokens=2, on_progress=seen.append))
    assert [p.done for p in seen if p.stage == "prompt"][-1] == seen[-1].total
    with pytest.raises(UnsupportedOption, match="isolated"), isolated.session():
        pass


def test_a_stream_that_is_left_or_stopped_leaves_the_model_free(isolated: Llava, picture: bytes) -> None:
    messages = [Message(text="Describe the image.", images=picture)]
    whole = isolated.chat(messages, max_tokens=24).text
    for n in range(6):
        stream = isolated.stream(messages, max_tokens=24)
        for _ in range(n):
            next(stream)
        stream.close()
    stopped = list(isolated.stream(messages, max_tokens=24, should_stop=lambda: True))
    assert stopped[-1].finish_reason == "cancelled"
    event = threading.Event()
    chunks = []
    for chunk in isolated.stream(messages, max_tokens=200, schema=LONG, should_stop=event.is_set):
        chunks.append(chunk)
        event.set()
    assert chunks[-1].finish_reason == "cancelled"
    assert isolated.chat(messages, max_tokens=24).text == whole


def test_who_comes_back_late_for_the_end_of_a_cancelled_stream_finds_it(
    isolated: Llava, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketllava.engine.process.GRACE_S", 1.0)
    stream, event = stoppable(isolated, picture)
    child = child_of(isolated)
    for chunk in stream:
        event.set()
        if chunk.finish_reason is not None:
            break
    time.sleep(1.2)
    assert list(stream) == []
    assert child.is_running()


def test_a_caller_s_pauses_are_not_taken_for_a_child_that_goes_on(
    isolated: Llava, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketllava.engine.process.GRACE_S", 1.0)
    stream, event = stoppable(isolated, picture)
    child = child_of(isolated)
    next(stream)
    time.sleep(0.3)  # frames wait to be taken
    event.set()
    next(stream)
    time.sleep(1.2)
    assert list(stream)[-1].finish_reason is not None
    assert child.is_running()


def test_the_next_call_is_answered_after_the_engine_died(isolated: Llava, picture: bytes) -> None:
    expected = isolated.ask(picture, QUESTION, max_tokens=8).token_ids
    for _ in range(2):
        stream = isolated.stream(
            [Message(text="Describe the image.", images=picture)], max_tokens=200, schema=LONG
        )
        next(stream)
        child_of(isolated).kill()
        with pytest.raises(EngineDied, match="ask again"):
            list(stream)
        assert isolated.ask(picture, QUESTION, max_tokens=8).token_ids == expected
    child = child_of(isolated)
    child.kill()  # between two calls nobody notices
    psutil.wait_procs([child], timeout=5)
    assert isolated.ask(picture, QUESTION, max_tokens=8).token_ids == expected
    isolated.unload()
    assert not isolated.loaded
    assert isolated.ask(picture, QUESTION, max_tokens=8).token_ids == expected
    assert isolated.loaded


def test_an_engine_that_goes_on_after_a_cancel_is_replaced(
    isolated: Llava, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = isolated.ask(picture, QUESTION, max_tokens=8).token_ids
    monkeypatch.setattr(process, "GRACE_S", 0.3)
    stream, stop = stoppable(isolated, picture)
    next(stream)
    child_of(isolated).suspend()
    stop.set()
    with pytest.raises(EngineDied, match=r"went on for 0.3 s after its call was cancelled\); ask again"):
        list(stream)
    assert isolated.ask(picture, QUESTION, max_tokens=8).token_ids == expected


PARENT = """
import os, sys
from pocketllava import Llava
model = Llava.load("demo", n_ctx=512, isolated=True)
assert "llama_cpp" not in sys.modules
print("loaded", flush=True)
model.ask(None, "Describe.", max_tokens=400)
os._exit(int("llama_cpp" in sys.modules))
"""


def test_no_orphan_and_no_code_of_the_current_folder(tmp_path: Path) -> None:
    for name in ("numpy", "queue", "llama_cpp"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(9)", "utf-8")
    parent = subprocess.Popen(
        [sys.executable, "-I", "-c", PARENT], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    assert parent.stdout.readline() == "loaded\n"
    children = psutil.Process(parent.pid).children()
    assert len(children) == 1
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 1
    while (
        children[0].is_running() and children[0].status() != psutil.STATUS_ZOMBIE and time.monotonic() < end
    ):
        time.sleep(0.02)
    assert not children[0].is_running() or children[0].status() == psutil.STATUS_ZOMBIE


def test_the_child_s_log_is_this_process_s(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "pocketllava"):
        Llava.load("demo", n_ctx=512, isolated=True).close()
    assert any(record.name == "pocketllava.llama" for record in caplog.records)


def test_what_starts_no_worker_is_refused() -> None:
    with pytest.raises(PocketLlavaError):
        Llava.load("demo", isolated=True, worker_command=["/nowhere/python"])
    with pytest.raises(InputError if os.name == "nt" else EngineDied):
        Llava.load("demo", isolated=True, worker_command=[sys.executable, "-c", "raise SystemExit(3)"])

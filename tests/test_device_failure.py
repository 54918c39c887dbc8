"""A device that fails amid an answer, as Metal's command buffers do: one line, nothing kept of it, a model loaded anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import scene

from pocketllava import EngineDied, Llava, Message
from pocketllava.llamacpp.log import capture_log

QUESTION = "What is at the center?"
LINE = b"ggml_metal_synchronize: error: command buffer 0 failed with status 5\n"


def fail() -> None:
    """What llama.cpp says of it, through its own callback; the call that waits for the device reports nothing."""
    capture_log()(4, LINE, None)


def once(function: Callable[[], None]) -> Callable[[], bool]:
    """A should_stop that calls a function the first time it is asked, and never stops."""
    calls = iter([function])

    def stop() -> bool:
        for call in calls:
            call()
        return False

    return stop


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Llava]:
    with Llava.load("demo", n_ctx=512, n_threads=1, cache_dir=tmp_path, keep_prefixes=True) as model:
        yield model


@pytest.fixture
def picture() -> Any:
    return np.asarray(scene(96, 80))


def test_an_answer_ends_with_one_line_and_the_next_is_whole(model: Llava, picture: Any) -> None:
    expected = model.ask(picture, QUESTION).token_ids
    stream = model.stream([Message("user", QUESTION, picture)])
    next(stream)
    fail()
    with pytest.raises(EngineDied, match=r"command buffer 0 failed with status 5.*ask again"):
        next(stream)
    assert not model.loaded
    assert model.ask(picture, QUESTION).token_ids == expected
    assert model.loaded


def test_nothing_is_kept_of_an_image_that_was_being_encoded(
    model: Llava, picture: Any, tmp_path: Path
) -> None:
    with pytest.raises(EngineDied):
        list(model.stream([Message("user", QUESTION, picture)], should_stop=once(fail)))
    assert not list(tmp_path.iterdir())
    assert model.ask(picture, QUESTION).timings.cached_tokens == 0
    assert list(tmp_path.glob("*.features.cached"))


def test_nothing_is_kept_of_a_prompt_that_was_being_evaluated(
    model: Llava, picture: Any, tmp_path: Path
) -> None:
    model.image_features(picture)
    with pytest.raises(EngineDied):
        list(model.stream([Message("user", QUESTION, picture)], should_stop=once(fail)))
    assert not list(tmp_path.glob("*.prefix.cached"))
    assert model.ask(picture, QUESTION).text


def test_answers_at_once_end_and_can_be_asked_again(model: Llava, picture: Any) -> None:
    def pictures() -> Iterator[Any]:
        yield picture
        fail()
        yield picture

    with pytest.raises(EngineDied):
        list(model.ask_many(pictures(), QUESTION, batch=2))
    assert len(list(model.ask_many([picture, picture], QUESTION, batch=2))) == 2


def test_what_can_be_asked_of_any_thread_needs_no_device(model: Llava, picture: Any) -> None:
    devices, stream = model.devices, model.stream([Message("user", QUESTION, picture)])
    next(stream)
    fail()
    with pytest.raises(EngineDied):
        next(stream)
    assert len(model.fingerprint(picture)) == 64
    assert model.n_ctx == 512
    assert model.devices == devices
    assert not model.loaded  # none of these loads it


def test_a_failure_of_a_model_that_is_gone_is_nobody_else_s(picture: Any) -> None:
    fail()
    with Llava.load("demo", n_ctx=512, n_threads=1) as model:
        assert model.ask(picture, QUESTION).text


def test_a_model_that_does_not_load_again_is_tried_at_each_call(
    model: Llava, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = model.stream([Message("user", QUESTION, picture)])
    next(stream)
    fail()
    with pytest.raises(EngineDied):
        next(stream)
    from pocketllava.errors import OutOfMemory
    from pocketllava.models import machine

    with monkeypatch.context() as small:
        small.setattr(machine, "limits", lambda: iter([machine.Limit("a test's limit", 1)]))
        with pytest.raises(OutOfMemory):
            model.ask(picture, QUESTION)
    assert model.ask(picture, QUESTION).text

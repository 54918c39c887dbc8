"""The bar that a terminal shows while an answer is waited for."""

from __future__ import annotations

import io
import sys

import pictures
import pytest

from pocketllava import Llava, Message, Options
from pocketllava.commands.waiting import Waiting, shown
from pocketllava.errors import InputError


class TerminalText(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> TerminalText:
    screen = TerminalText()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_it_tells_of_images_and_of_the_prompt_and_is_gone_before_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = terminal(monkeypatch)
    with Llava.load("demo") as llava:
        waiting = Waiting(delay_s=0)
        question = [Message("user", "What is it?", (pictures.scene(90, 60),))]
        for _ in shown(llava.stream(question, options=Options(max_tokens=3), on_progress=waiting), waiting):
            before = screen.getvalue()
            assert "image: " in before
            assert "prompt: " in before
            assert before.endswith(" \r")  # wiped
        assert screen.getvalue() == before  # nothing in the midst of the answer


def test_a_failure_wipes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = terminal(monkeypatch)
    with Llava.load("demo") as llava:
        waiting = Waiting(delay_s=0)
        with pytest.raises(InputError):
            list(shown(llava.stream([Message("user", "long " * 3_000)], on_progress=waiting), waiting))
    assert screen.getvalue() == "" or screen.getvalue().endswith("\r")


@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_is_drawn_in_a_file_or_when_quiet(quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = TerminalText() if quiet else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with Llava.load("demo") as llava:
        waiting = Waiting(quiet=quiet, delay_s=0)
        list(shown(llava.stream([Message("user", "Hello.")], on_progress=waiting), waiting))
    assert screen.getvalue() == ""

"""Ctrl-C at any moment: in Python, in llama.cpp, or in a callback between them. None is lost."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pictures
import pytest

from pocketllava import Bundle, Llava, Message, Options
from pocketllava.llamacpp.guard import EvalCallback, Held, Interrupted
from pocketllava.llamacpp.library import Node

DEADLINE_S = 30  # far beyond what a busy machine takes: an interrupt that is lost never comes
N_INTERRUPTS = 25
# A shell that starts a program with & has it ignore SIGINT, and its children after it.
ASKING = """
import signal
import sys
import numpy as np
from pocketllava import Llava, Options

signal.signal(signal.SIGINT, signal.default_int_handler)
with Llava.load(sys.argv[1]) as llava:
    rng, options = np.random.default_rng(0), Options(max_tokens=16)
    picture = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    expected = llava.ask(picture, "What is it?", options=options).token_ids
    print("ready", flush=True)
    for _ in range(int(sys.argv[2])):
        try:
            while True:
                llava.ask(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), "What?", options=options)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    print(llava.ask(picture, "What is it?", options=options).token_ids == expected, flush=True)
"""


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python program that is gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_none_is_lost_in_a_loop_of_questions(bundle: Bundle) -> None:
    """A lost one would leave the loop going on for ever; one that broke something, another answer at the end."""
    moments = random.Random(0)
    with child(ASKING, str(bundle.folder), str(N_INTERRUPTS)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(N_INTERRUPTS):
            time.sleep(moments.uniform(0, 0.25))
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "interrupted\n"
        assert process.stdout.readline() == "True\n"
        assert process.wait(DEADLINE_S) == 0


def test_what_a_callback_raises_comes_out_of_c(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = pictures.four()[0]
    with llava.session() as session:
        image = session.images.process(picture)
        expected = session.vision.encode(image.tiles[0])

        def interrupted(node: Node) -> bool:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(session.vision.correction, "wants", interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.vision.encode(image.tiles[0])
        assert np.array_equal(session.vision.encode(image.tiles[0]), expected)


def test_encoding_can_be_stopped(llava: Llava) -> None:
    with llava.session() as session:
        image = session.images.process(pictures.four()[0])
        expected = session.vision.encode(image.tiles[0])
        for after in (0, 1, 50):
            left = iter(range(after))
            with pytest.raises(Interrupted):
                session.vision.encode(image.tiles[0], lambda left=left: next(left, None) is None)  # type: ignore[misc]
        assert np.array_equal(session.vision.encode(image.tiles[0]), expected)


def test_an_error_of_should_stop_is_the_callers(llava: Llava) -> None:
    """During prompt evaluation it is called inside llama.cpp."""

    def broken() -> bool:
        raise LookupError("a user's mistake")

    llava.clear_cache()
    for image in ((), (pictures.four()[0],)):
        with pytest.raises(LookupError, match="a user's mistake"):
            list(llava.stream([Message("user", "What is it?", image)], should_stop=broken))
    assert llava.ask(None, "Well?", options=Options(max_tokens=2)).token_ids


def test_the_first_exception_is_held_until_it_is_asked_for() -> None:
    held, calls = Held(), []

    def call(error: Any) -> bool:
        calls.append(error)
        raise error

    assert held.call(call, KeyboardInterrupt(), failed=True) is True
    assert held.call(call, ValueError("later"), failed=False) is False
    assert len(calls) == 1  # once something is held, nothing more is called
    with pytest.raises(KeyboardInterrupt):
        held.check()
    held.check()
    assert held.call(lambda: True, failed=False) is True


def test_a_callback_says_what_it_wants() -> None:
    with pytest.raises(TypeError, match="abstract"):
        EvalCallback()  # type: ignore[abstract]


EARLY = """
import os, signal, sys
from pocketllava.__main__ import main

class Finder:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
@pytest.mark.parametrize("module", ["pocketllava.cli", "click", "pocketllava.commands.verify"])
def test_an_interrupt_while_the_command_line_is_imported_is_quiet(module: str) -> None:
    with child(EARLY, module) as process:
        _, stderr = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, stderr) == (130, "")

"""`pocketllava chat` as a user starts it: over pipes, and on a real terminal."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prompt_toolkit.utils import get_cwidth

from pocketllava import Bundle, Llava, Options
from pocketllava.chat.dialogue import Dialogue, Gallery
from pocketllava.chat.wrap import Wrap
from pocketllava.commands.chat import Chat, examination
from pocketllava.models.demo.picture import drawn_picture

CHAT = [sys.executable, "-m", "pocketllava.cli", "chat"]
DEADLINE_S = 60
# Makes the terminal on stdin the one that Ctrl-C comes from, then becomes the command.
# A shell that starts pytest with & has it ignore SIGINT, and its children after it; one that starts a chat does not.
ON_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


def chat(*arguments: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    """The command over pipes."""
    return subprocess.run(
        [*CHAT, *arguments], input=lines, capture_output=True, text=True, encoding="utf-8", check=False
    )


@pytest.fixture(scope="module")
def picture() -> str:
    """A scene that the demo model knows, with a green number and three squares."""
    return str(drawn_picture())


def test_a_conversation_over_pipes(picture: str, tmp_path: Path) -> None:
    saved = tmp_path / "my chat.json"
    lines = f"""How many objects are there?
What is at the center?
/retry

./nowhere.png what is it?
/imgae
/save {saved}
/clear
/images
/load {saved}
/images
{picture}
Where is the dog?
/stats
/quit
How many objects are there?
"""
    done = chat("demo", picture, lines=lines)
    assert done.returncode == 0
    assert done.stdout == "4\na blue square\na blue square\nI can't see that.\n"
    told = done.stderr.splitlines()
    name = Path(picture).name
    assert told[:5] == [
        f"image 1: {name} 336x336, preparing",
        "(the same answer: at --temperature 0 it is always the likeliest one)",
        "error: ./nowhere.png: no such file; the message was not sent",
        "error: /imgae: no such command; did you mean /image? /help lists them, and // sends a line that starts with /",
        f"saved {saved}: 2 turns, 1 image",
    ]
    assert told[5:7] == ["conversation and images forgotten", "no images yet"]
    assert told[-4:-2] == [f"image 1: {name} 336x336, turn 1", f"image 2: {name} 336x336, preparing"]
    assert "first token" in told[-2]
    assert re.fullmatch(r"3 turns, 2 images, \d+ of 2048 tokens", told[-1])
    assert json.loads(saved.read_text("utf-8"))["messages"][-1] == {
        "role": "assistant",
        "text": "a blue square",
    }


def test_what_cannot_be_answered_is_one_line_and_the_conversation_goes_on(picture: str) -> None:
    long = "What is at the center? " * 40
    done = chat(
        "demo",
        picture,
        "--ctx",
        "256",
        "--stats",
        lines=f"How many objects are there?\n{long}\nHow many objects are there?\n",
    )
    assert done.returncode == 0
    assert done.stdout == "4\n4\n"
    told = done.stderr.splitlines()
    assert len(told) == 4  # the image, two timings, and
    assert told[2].startswith("error: prompt: ")
    assert "context of 256" in told[2]
    assert told[2].endswith("/clear forgets the conversation, --truncate leaves out its oldest turns")


def test_truncate_counts_the_messages_that_it_left_out(picture: str) -> None:
    done = chat(
        "demo",
        picture,
        "--ctx",
        "256",
        "--max-tokens",
        "8",
        "--truncate",
        lines="How many objects are there?\n" * 30,
    )
    assert done.returncode == 0
    assert done.stdout.count("\n") == 30
    assert re.search(r"^\(the oldest \d+ messages were left out\)$", done.stderr, re.M)


def test_what_is_wrong_at_the_start_ends_it(tmp_path: Path) -> None:
    for arguments, complaint in (
        (("nowhere",), "error: nowhere: found nothing"),
        (("demo", "nowhere.png"), "error: nowhere.png: cannot be read (No such file or directory)"),
        (("demo", __file__), "bytes that are not an image"),
        (("demo", "--load", "nowhere.json"), "nowhere.json: cannot be read (No such file or directory)"),
    ):
        done = chat(*arguments, lines="Hello.\n")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert complaint in done.stderr


class Screen:
    """A command on a terminal of its own: keys in, what it shows out."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self._terminal, inside = pty.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        places = {name: str(home) for name in ("HOME", "XDG_STATE_HOME")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, *CHAT, *arguments],
            stdin=inside, stdout=inside, stderr=inside, start_new_session=True, cwd=home,
            env={**os.environ, **places, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "NO_COLOR": "1"},
        )  # fmt: skip
        os.close(inside)
        self._shown = ""

    def types(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def until(self, pattern: str) -> str:
        """Read until the pattern is shown; what was shown up to its end, without colors and cursor movements."""
        end = time.monotonic() + DEADLINE_S
        while not (found := re.search(pattern, self._shown, re.S)):
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self._shown!r}"
            self._shown = plain(self._shown + os.read(self._terminal, 1 << 12).decode("utf-8", "replace"))
        self._shown = self._shown[found.end() :]
        return found[0]

    def close(self) -> int:
        """Read what is left, and wait for the end."""
        try:
            while os.read(self._terminal, 1 << 16):
                pass
        except OSError:  # Linux's way to say that nobody is at the other end
            pass
        os.close(self._terminal)
        return self.process.wait(DEADLINE_S)


# Forty letters. Not of a bar, which returns to the line's beginning, and is drawn where a prompt takes a while.
OF_AN_ANSWER = r"(?:(?:[^\S\r]|\r\n)*[^\s|]){40}"


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
def test_a_conversation_on_a_terminal(endless: Bundle, tmp_path: Path) -> None:
    """Answers that do not end, so that Ctrl-C always comes in the middle of one."""
    screen = Screen([str(endless.folder), "--ctx", "4096", "--max-tokens", "4000"], tmp_path)
    screen.until("Ctrl-D leaves.*>")
    screen.types("Count.\r")
    screen.until(f"Count.*\n{OF_AN_ANSWER}")
    screen.types("\x03")
    screen.until(r"\(stopped\).*>")
    screen.types("\x1b[200~one\ntwo\x1b[201~ and\\\rthree\r")  # a paste of two lines, and a line that goes on
    screen.until(f"three.*\n{OF_AN_ANSWER}")
    screen.types("\x03")
    screen.until(r"\(stopped\).*>")
    screen.types("/save chat.json\r")
    screen.until("2 turns.*>")
    screen.types("never sent\x03")
    screen.types("\x03")
    screen.until("Ctrl-D or /quit leaves.*>")
    screen.types("\x04")
    assert screen.close() == 0
    messages = json.loads((tmp_path / "chat.json").read_text("utf-8"))["messages"]
    assert [m["text"] for m in messages[::2]] == ["Count.", "one\ntwo and\nthree"]
    assert all(len(m["text"]) > 20 for m in messages[1::2])
    history = next(tmp_path.rglob("chat_history")).read_text("utf-8")
    assert re.findall(r"^\+(.*)", history, re.M) == ["Count.", "one", "two and", "three", "/save chat.json"]


def n_tokens(llava: Llava) -> int:
    """Positions that the KV cache holds."""
    with llava.session() as session:
        return session.text.n_tokens


def test_an_image_is_worked_on_while_its_question_is_typed(llava: Llava, picture: str) -> None:
    dialogue = Dialogue(Gallery(examination(llava.bundle, None)))
    conversation = Chat(llava, dialogue, Options(max_tokens=1), stats=False, on_terminal=False)
    llava.clear_cache()
    conversation.look_ahead(f"'{picture}' What is")
    until = time.monotonic() + DEADLINE_S
    while n_tokens(llava) < 576 and time.monotonic() < until:
        time.sleep(0.01)
    assert conversation.handle(f"'{picture}' What is it?")
    assert dialogue.timings
    assert dialogue.timings.cached_tokens >= 576


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from pocketllava.chat.terminal import LineCompleter

    (tmp_path / "my pictures").mkdir()
    for name in ("a b.png", "a.txt", "chat.json", ".hidden.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    completer = LineCompleter({"image": "", "images": "", "load": ""})

    def complete(line: str) -> list[str]:
        found = completer.get_completions(Document(line), CompleteEvent())
        return [line[: len(line) + c.start_position] + c.text for c in found]

    assert complete("/im") == ["/image", "/images"]
    assert complete("/image ") == ["/image a b.png", "/image my pictures/"]
    assert complete("/image a ") == ["/image a b.png"]
    assert complete("/load ") == ["/load chat.json", "/load my pictures/"]
    assert complete("what is in 'a") == ["what is in 'a b.png"]
    assert complete(f"{tmp_path.as_posix()}/my p") == [f"{tmp_path.as_posix()}/my pictures/"]
    assert complete("/images ") == complete("nothing like it") == []


@example(pieces=["   a", "a"], columns=4)  # spaces that leave no room for the word behind them
@given(pieces=st.lists(st.text("abc \n漢", max_size=50)), columns=st.integers(4, 40))
def test_lines_break_between_words_while_they_stream(pieces: list[str], columns: int) -> None:
    whole, wrap = Wrap(lambda: columns), Wrap(lambda: columns)
    text = "".join(pieces)
    shown = "".join([*map(wrap.add, pieces), wrap.finish()])
    assert shown == whole.add(text) + whole.finish()
    assert "".join(shown.split()) == "".join(text.split())
    assert (
        max(map(len, text.split()), default=0) > columns // 2
        or max(map(get_cwidth, shown.split("\n"))) <= columns
    )
    if max(map(get_cwidth, text.split("\n"))) <= columns:  # nothing to break
        assert shown == re.sub(" +$", "", text, flags=re.M)

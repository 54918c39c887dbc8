"""A typed line of a chat -> a Step: a command's effect on the conversation, images to attach, or the next question.

Knows Dialogue and typed lines; prints nothing, asks no model. Errors of a line are raised.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketllava.chat.dialogue import Dialogue, Picture, Question
from pocketllava.chat.image_paths import find_images, image_arguments, one_path
from pocketllava.errors import InputError
from pocketllava.types import Timings

MAX_CHARACTERS = 1 << 17  # of a message; llama.cpp needs minutes for the tokens of a megabyte without spaces
SHOWN = 100  # characters of the last question and answer, after /load
SIMILARITY = 0.4  # of a mistyped command to the one that is suggested
GOODBYES = ("exit", "quit")
KEYS = (
    "  Drag images in, or paste or type their paths, anywhere in a line. On a line",
    "  of their own they wait for the next message, and are evaluated meanwhile.",
    "  A word that ends like an image file is one: to mention a name, leave out its end.",
    "  Alt-Enter, or \\ at the end, starts another line. Up and Down bring earlier",
    "  lines back, Ctrl-R searches them. // sends a line that starts with /.",
    "  Ctrl-C stops an answer or clears the line. Ctrl-D, exit and /bye leave.",
)


@dataclass(frozen=True)
class Step:
    """The effect of a line: notes (timings first), a question to answer, waiting images to prefill, or leaving."""

    lines: tuple[str, ...] = ()
    question: Question | None = None
    prefill: bool = False
    leave: bool = False
    timings: Timings | None = None


def handle(dialogue: Dialogue, line: str) -> Step:
    """Apply one line. Raises InputError and its kinds, and then leaves the conversation as it was."""
    line = line.strip()
    if len(line) > MAX_CHARACTERS and line[:5].lower() != "data:" and not line.startswith("/image "):
        raise InputError(
            f"message: found {len(line)} characters, expected at most {MAX_CHARACTERS}; shorten it"
        )
    if line.lower() in GOODBYES:
        return Step(leave=True)
    if line.startswith("//"):
        return Step(question=dialogue.question(line[1:]))
    first = re.split(r"\s", line, maxsplit=1)[0]
    if first.startswith("/") and first[1:].lower() in COMMANDS:
        return COMMANDS[first[1:].lower()].run(dialogue, line[len(first) :].strip())
    return _message(dialogue, line, first)


def _message(dialogue: Dialogue, line: str, first: str) -> Step:
    """Images, a question, or both; nothing for an empty line."""
    message = find_images(line)
    if first.startswith("/") and message.text.startswith(first) and (not message.missing or _is_name(first)):
        raise InputError(_unknown(first))
    if message.missing:
        more = f" (and {len(message.missing) - 1} more)" if len(message.missing) > 1 else ""
        raise InputError(f"{message.missing[0]}{more}; the message was not sent")
    pictures = [dialogue.gallery.open(path) for path in message.images]
    if not message.text:
        return attach(dialogue, pictures)
    question = dialogue.question(message.text, pictures)
    number = {
        p: n for n, p in enumerate(question.turn.pictures, 1 + len(dialogue.pictures) - len(dialogue.waiting))
    }
    return Step(tuple(_line(number[p], p) for p in pictures), question)


def attach(dialogue: Dialogue, pictures: Sequence[Picture]) -> Step:
    """Attach images to the next message, with a line for each."""
    numbers = dialogue.attach(pictures)
    lines = (f"{_line(n, p)}, preparing" for n, p in zip(numbers, pictures, strict=True))
    return Step(tuple(lines), prefill=bool(pictures))


def _is_name(word: str) -> bool:
    return re.fullmatch(r"/[^/.]*", word) is not None


def _unknown(word: str) -> str:
    names = difflib.get_close_matches(word[1:].lower(), COMMANDS, n=1, cutoff=SIMILARITY)
    nearest = f"did you mean /{names[0]}? " if names else ""
    reason = "no such command" if _is_name(word) else "no image and no command"
    return f"{word}: {reason}; {nearest}/help lists them, and // sends a line that starts with /"


def _line(number: int, picture: Picture) -> str:
    width, height = picture.size
    return f"image {number}: {picture.name} {width}x{height}"


def _image(dialogue: Dialogue, argument: str) -> Step:
    if not argument:
        raise InputError("/image: expected an image's path; /images lists those that are there")
    sources = [argument] if argument[:5].lower() == "data:" else image_arguments(argument)
    return attach(dialogue, [dialogue.gallery.open(source) for source in sources])


def _images(dialogue: Dialogue, _argument: str) -> Step:
    lines = (
        f"{_line(n, p)}, {f'turn {turn}' if turn else 'waits for the next message'}"
        for n, (p, turn) in enumerate(dialogue.pictures, 1)
    )
    return Step(tuple(lines) or ("no images yet",))


def _clear(dialogue: Dialogue, argument: str) -> Step:
    if argument == "images":
        n = len(dialogue.waiting)
        dialogue.clear_waiting()
        return Step((f"{_count(n, 'waiting image')} forgotten",))
    if argument:
        raise InputError(f"/clear: found {argument!r}, expected nothing, or images for those that wait")
    dialogue.clear()
    return Step(("conversation and images forgotten",))


def _retry(dialogue: Dialogue, _argument: str) -> Step:
    return Step(question=dialogue.last_question())


def _system(dialogue: Dialogue, argument: str) -> Step:
    if not argument:
        return Step((f"system: {dialogue.system}" if dialogue.system else "no system text",))
    dialogue.system = "" if argument in ('""', "''") else argument
    return Step(("system text set" if dialogue.system else "system text removed",), prefill=True)


def _save(dialogue: Dialogue, argument: str) -> Step:
    dialogue.save(_file(dialogue, argument, "save"))
    return Step((f"saved {dialogue.file}: {_extent(dialogue)}",))


def _load(dialogue: Dialogue, argument: str) -> Step:
    return load(dialogue, _file(dialogue, argument, "load"))


def load(dialogue: Dialogue, path: Path) -> Step:
    """Load a saved conversation, with lines about it. Raises InputError and its kinds."""
    model = dialogue.load(path)
    lines = [f"loaded {dialogue.file}: {_extent(dialogue)}"]
    if model != dialogue.model:
        lines.append(f"its answers are from {model}, this is {dialogue.model}")
    if dialogue.turns:
        last = dialogue.turns[-1]
        lines += [f"last question: {_short(last.text)}", f"last answer: {_short(last.answer)}"]
    return Step(tuple(lines), prefill=True)


def _file(dialogue: Dialogue, argument: str, name: str) -> Path:
    if argument:
        return one_path(argument)
    if dialogue.file is None:
        raise InputError(f"/{name}: expected a file's name")
    return dialogue.file


def _stats(dialogue: Dialogue, _argument: str) -> Step:
    t = dialogue.timings
    used = t.prompt_tokens + t.answer_tokens if t else 0
    room = f"{used} of {dialogue.n_ctx} tokens" if t else f"{dialogue.n_ctx} tokens of context"
    return Step((f"{_extent(dialogue)}, {room}",), timings=t)


def _help(_dialogue: Dialogue, _argument: str) -> Step:
    width = max(len(f"{name} {c.argument}") for name, c in COMMANDS.items())
    lines = (f"  /{f'{name} {c.argument}':<{width}}  {c.help}" for name, c in COMMANDS.items() if c.help)
    return Step((*lines, *KEYS))


def _quit(_dialogue: Dialogue, _argument: str) -> Step:
    return Step(leave=True)


def _extent(dialogue: Dialogue) -> str:
    return f"{_count(len(dialogue.turns), 'turn')}, {_count(len(dialogue.pictures), 'image')}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _short(text: str) -> str:
    return textwrap.shorten(text, SHOWN, placeholder=" ...")


@dataclass(frozen=True)
class Command:
    """A slash command: its argument, its help and its function. A command without help is hidden."""

    argument: str
    help: str
    run: Callable[[Dialogue, str], Step]


COMMANDS = {
    "image": Command("PATH...", "show images with the next message", _image),
    "images": Command("", "list the images, with their turns", _images),
    "retry": Command("", "answer the last question again", _retry),
    "system": Command("TEXT", 'set the system text; "" removes it; alone: show it', _system),
    "clear": Command("[images]", "forget everything, or just the images that wait", _clear),
    "save": Command("FILE", "write the conversation to a file", _save),
    "load": Command("FILE", "go on with a saved conversation", _load),
    "stats": Command("", "timings of the last answer, and the room that is left", _stats),
    "help": Command("", "show this", _help),
    "quit": Command("", "leave", _quit),
    "exit": Command("", "", _quit),
    "bye": Command("", "", _quit),
}

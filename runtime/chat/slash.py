"""What a line of a chat means: a command's effect on the conversation, images, or the next question.

Knows Dialogue and typed lines; prints nothing, asks no model. What is wrong with a line is raised.
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
from pocketllava.commands.show import timing_line
from pocketllava.errors import InputError

SHOWN = 100  # characters of what was said last, after /load
ENOUGH_ALIKE = 0.4
KEYS = (
    "  Drag images in, or paste or type their paths, anywhere in a line. On a line",
    "  of their own they wait for the next message, and are worked on meanwhile.",
    "  Alt-Enter, or \\ at its end, goes on to another line. Up and Down bring earlier",
    "  lines back, Ctrl-R searches them. // sends a line that starts with /.",
    "  Ctrl-C stops an answer or clears the line. Ctrl-D leaves.",
)


@dataclass(frozen=True)
class Step:
    """What to do about a line: tell these lines, work on images ahead, ask a question, leave."""

    lines: tuple[str, ...] = ()
    question: Question | None = None
    prepare: bool = False
    leave: bool = False


def handle(dialogue: Dialogue, line: str) -> Step:
    """Take up one line. Raises InputError and its kinds, with the conversation as it was."""
    line = line.strip()
    if line.startswith("//"):
        return Step(question=dialogue.question(line[1:]))
    first = re.split(r"\s", line, maxsplit=1)[0]
    if first.startswith("/") and first[1:].lower() in COMMANDS:
        return COMMANDS[first[1:].lower()].run(dialogue, line[len(first) :].strip())
    return _message(dialogue, line, first)


def _message(dialogue: Dialogue, line: str, first: str) -> Step:
    """Images, a question, or both; nothing for an empty line."""
    found = find_images(line)
    if first.startswith("/") and found.text.startswith(first) and (not found.missing or _is_name(first)):
        raise InputError(_unknown(first))
    if found.missing:
        more = f" (and {len(found.missing) - 1} more)" if len(found.missing) > 1 else ""
        raise InputError(f"{found.missing[0]}{more}; the message was not sent")
    if not found.text:
        return show(dialogue, [dialogue.gallery.open(path) for path in found.images])
    pictures = [dialogue.gallery.open(path) for path in found.images]
    question = dialogue.question(found.text, pictures)
    number = {
        p: n for n, p in enumerate(question.turn.pictures, 1 + len(dialogue.pictures) - len(dialogue.waiting))
    }
    return Step(tuple(_line(number[p], p) for p in pictures), question)


def show(dialogue: Dialogue, pictures: Sequence[Picture]) -> Step:
    """Let images wait for the next message, and say so."""
    numbers = dialogue.show(pictures)
    lines = (f"{_line(n, p)}, preparing" for n, p in zip(numbers, pictures, strict=True))
    return Step(tuple(lines), prepare=bool(pictures))


def _is_name(word: str) -> bool:
    return re.fullmatch(r"/[^/.]*", word) is not None


def _unknown(word: str) -> str:
    names = difflib.get_close_matches(word[1:].lower(), COMMANDS, n=1, cutoff=ENOUGH_ALIKE)
    nearest = f"did you mean /{names[0]}? " if names else ""
    what = "no such command" if _is_name(word) else "no image and no command"
    return f"{word}: {what}; {nearest}/help lists them, and // sends a line that starts with /"


def _line(number: int, picture: Picture) -> str:
    width, height = picture.size
    return f"image {number}: {picture.name} {width}x{height}"


def _image(dialogue: Dialogue, argument: str) -> Step:
    if not argument:
        raise InputError("/image: expected an image's path; /images lists those that are there")
    sources = [argument] if argument[:5].lower() == "data:" else image_arguments(argument)
    return show(dialogue, [dialogue.gallery.open(source) for source in sources])


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
    return Step(question=dialogue.again())


def _system(dialogue: Dialogue, argument: str) -> Step:
    if not argument:
        return Step((f"system: {dialogue.system}" if dialogue.system else "no system text",))
    dialogue.system = "" if argument in ('""', "''") else argument
    return Step(("system text set" if dialogue.system else "system text removed",), prepare=True)


def _save(dialogue: Dialogue, argument: str) -> Step:
    dialogue.save(_file(dialogue, argument, "save"))
    return Step((f"saved {dialogue.file}: {_extent(dialogue)}",))


def _load(dialogue: Dialogue, argument: str) -> Step:
    return loaded(dialogue, _file(dialogue, argument, "load"))


def loaded(dialogue: Dialogue, path: Path) -> Step:
    """Take up a saved conversation, and say what it is. Raises InputError and its kinds."""
    model = dialogue.load(path)
    lines = [f"loaded {dialogue.file}: {_extent(dialogue)}"]
    if model != dialogue.model:
        lines.append(f"it was held with {model}, this is {dialogue.model}")
    if dialogue.turns:
        last = dialogue.turns[-1]
        lines += [f"last question: {_short(last.text)}", f"last answer: {_short(last.answer)}"]
    return Step(tuple(lines), prepare=True)


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
    return Step((*([timing_line(t)] if t else []), f"{_extent(dialogue)}, {room}"))


def _help(_dialogue: Dialogue, _argument: str) -> Step:
    width = max(len(f"{name} {c.argument}") for name, c in COMMANDS.items())
    lines = (f"  /{f'{name} {c.argument}':<{width}}  {c.help}" for name, c in COMMANDS.items() if c.help)
    return Step((*lines, *KEYS))


def _quit(_dialogue: Dialogue, _argument: str) -> Step:
    return Step(leave=True)


def _extent(dialogue: Dialogue) -> str:
    return f"{_count(len(dialogue.turns), 'turn')}, {_count(len(dialogue.pictures), 'image')}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _short(text: str) -> str:
    return textwrap.shorten(text, SHOWN, placeholder=" ...")


@dataclass(frozen=True)
class Command:
    """A slash command: how its argument is called, what it does in a few words, and how. No help hides it."""

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
}

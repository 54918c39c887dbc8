"""A conversation as state: its turns, the images that wait for the next message, and its file.

Knows messages, image files and JSON; no terminal, no model, no pixels. A picture is its file's bytes as they were when
it was named, so a screenshot that is overwritten or deleted later does not change the conversation.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllava.errors import InputError
from pocketllava.models import Bundle
from pocketllava.models.files import atomic_write, expanded, open_regular, read_regular
from pocketllava.types import MAX_FILE_BYTES, ImageSource, Message, Timings

FORMAT, VERSION = "pocketllava conversation", 1
HEAD_BYTES = 4096  # of a saved conversation, which hold FORMAT
Examine = Callable[
    [ImageSource], tuple[int, int]
]  # an image's (width, height); raises ImageError for a broken one


@dataclass(frozen=True)
class Picture:
    """An image that can be decoded: its file's bytes and its size (width, height). path: None for a data URI."""

    data: bytes
    size: tuple[int, int]
    path: Path | None = None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.path.name if self.path else "data URI"

    @property
    def sha256(self) -> str:
        """Of its bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Turn:
    """A question with its images, and the answer it got."""

    text: str
    pictures: tuple[Picture, ...] = ()
    answer: str = ""


@dataclass(frozen=True)
class Question:
    """A turn that waits for its answer. It becomes turn `index` of the conversation and replaces any that is there."""

    turn: Turn
    index: int


class Gallery:
    """Reads images and examines them at once, so that a broken one is reported before a question refers to it."""

    def __init__(self, examine: Examine) -> None:
        self._examine = examine

    def open(self, source: str | os.PathLike[str]) -> Picture:
        """A path or a data URI -> Picture. Raises ImageError."""
        size = self._examine(source)
        if isinstance(source, str) and source[:5].lower() == "data:":
            return Picture(base64.b64decode(source.partition(",")[2]), size)
        path = expanded(source).absolute()
        return Picture(
            read_regular(path, MAX_FILE_BYTES), size, path.resolve() if ".." in path.parts else path
        )


class Dialogue:
    """A conversation that changes by whole turns only. A call that fails leaves it as it was."""

    def __init__(self, gallery: Gallery, model: str = "", system: str = "") -> None:
        self.gallery, self.model, self.system = gallery, model, system
        self.turns: list[Turn] = []
        self.waiting: list[Picture] = []
        self.unanswered: Question | None = None
        self.timings: Timings | None = None
        self.file: Path | None = None
        self.n_ctx = 0  # the model's, once it is loaded

    @property
    def pictures(self) -> list[tuple[Picture, int | None]]:
        """All images in order, each with the number of its turn, or None while it waits."""
        numbered = [(p, n) for n, turn in enumerate(self.turns, 1) for p in turn.pictures]
        return [*numbered, *((p, None) for p in self.waiting)]

    def attach(self, pictures: Sequence[Picture]) -> list[int]:
        """Attach images to the next message; returns their numbers. One that waits already keeps its own."""
        self.waiting += [p for p in dict.fromkeys(pictures) if p not in self.waiting]
        first = len(self.pictures) - len(self.waiting) + 1
        return [first + self.waiting.index(p) for p in pictures]

    def question(self, text: str, pictures: Sequence[Picture] = ()) -> Question:
        """The next turn: a text about the images that wait, and these."""
        return Question(Turn(text, tuple(dict.fromkeys([*self.waiting, *pictures]))), len(self.turns))

    def last_question(self) -> Question:
        """The question that got no answer, or else the last one. Raises InputError if there is none."""
        if self.unanswered is None and not self.turns:
            raise InputError("/retry: no question yet")
        return self.unanswered or Question(self.turns[-1], len(self.turns) - 1)

    def messages(self, question: Question | None = None) -> list[Message]:
        """The conversation for the model: up to a question and with it, or all of it."""
        turns = self.turns if question is None else self.turns[: question.index]
        messages = [Message("system", self.system)] if self.system else []
        for turn in turns:
            messages += [_user_message(turn), Message("assistant", turn.answer)]
        return messages if question is None else [*messages, _user_message(question.turn)]

    def add_answer(self, question: Question, answer: str, timings: Timings | None = None) -> None:
        """Add a question with its answer, whole or cut short."""
        turn = question.turn
        self.turns[question.index :] = [Turn(turn.text, turn.pictures, answer)]
        self.waiting = [p for p in self.waiting if p not in turn.pictures]
        self.unanswered, self.timings = None, timings or self.timings

    def add_failure(self, question: Question) -> None:
        """Remember a question that got no answer, for last_question(); the conversation stays as it is."""
        self.unanswered = question

    def to_prefill(self) -> tuple[list[bytes], list[Message]] | None:
        """The images to evaluate ahead, those that wait or the last turn's that has any, and the messages before."""
        if self.waiting:
            return [p.data for p in self.waiting], self.messages()
        for index, turn in reversed(list(enumerate(self.turns))):
            if turn.pictures:
                return [p.data for p in turn.pictures], self.messages(Question(turn, index))[:-1]
        return None

    def clear(self) -> None:
        """Forget the turns and the images; the system text stays."""
        self.turns, self.timings = [], None
        self.clear_waiting()

    def clear_waiting(self) -> None:
        """Forget the images that wait for the next message."""
        self.waiting, self.unanswered = [], None

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, whole or not at all. Raises InputError, and leaves foreign files alone."""
        try:
            path = path.resolve()  # a link stays a link
            if path.exists() and not _is_conversation(path):
                raise InputError(f"{path}: another file, not a saved conversation; take another name")
            text = json.dumps(self._to_json(path.parent), ensure_ascii=False, indent=1)
            with atomic_write(path) as part:
                part.write_bytes(text.encode("utf-8", "surrogateescape"))
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: cannot be written ({_reason(error)})") from error
        self.file = path

    def load(self, path: Path) -> str:
        """Replace this conversation with a saved one; returns the model that gave its answers.

        Raises InputError for another file, or for images that changed; this conversation then stays.
        """
        try:
            path = path.resolve()
            if not _is_conversation(path):
                raise InputError(f"{path}: not a conversation that /save wrote")
            data = read_regular(path, MAX_FILE_BYTES).removeprefix(BOM_UTF8)
            content = json.loads(data.decode("utf-8", "surrogateescape"))
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: cannot be read ({_reason(error)})") from error
        if content.get("version") != VERSION:
            raise InputError(f"{path}: found version {content.get('version')!r}, expected {VERSION}")
        try:
            system, model = _whole_text(content["system"]), _text(content["model"])
            turns = self._turns(path, content["messages"])
            waiting = [self._picture(path, entry) for entry in content["waiting"]]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(f"{path}: an incomplete conversation ({error!r}); save it again") from error
        self.clear()
        self.system, self.turns, self.waiting, self.file = system, turns, waiting, path
        return model

    def _to_json(self, folder: Path) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            images = [_reference(p, folder) for p in turn.pictures]
            messages.append({"role": "user", "text": turn.text, "images": images})
            messages.append({"role": "assistant", "text": turn.answer})
        head = {"format": FORMAT, "version": VERSION, "model": self.model, "system": self.system}
        return {**head, "messages": messages, "waiting": [_reference(p, folder) for p in self.waiting]}

    def _turns(self, path: Path, messages: Any) -> list[Turn]:
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError("the roles do not alternate between user and assistant")
        return [
            Turn(
                _whole_text(user["text"]),
                tuple(self._picture(path, entry) for entry in user.get("images", ())),
                _whole_text(assistant["text"]),
            )
            for user, assistant in zip(messages[::2], messages[1::2], strict=True)
        ]

    def _picture(self, path: Path, entry: Any) -> Picture:
        """The image of an entry. Raises ImageError if it is missing, InputError if it changed."""
        source = _text(entry["data"]) if "data" in entry else path.parent / _text(entry["path"])
        picture = self.gallery.open(source)
        if picture.sha256 != entry["sha256"]:
            raise InputError(
                f"{picture.path or 'data URI'}: changed since {path.name} was saved; put it back"
            )
        return picture


def bundle_id(bundle: Bundle) -> str:
    """A bundle's source, types and the beginning of its text model's SHA-256."""
    m = bundle.manifest
    types = f"{m.types.model}+{m.types.mmproj}"
    return f"{m.source.id} {types} {m.files['model.gguf'].digest[:12]}"


def _user_message(turn: Turn) -> Message:
    return Message("user", turn.text, tuple(p.data for p in turn.pictures))


def _reference(picture: Picture, folder: Path) -> dict[str, str]:
    """A picture in a file of this folder: its path while that holds the same bytes, else its bytes."""
    if picture.path is None or not _is_unchanged(picture):
        kind = _format(picture.data)
        encoded = base64.b64encode(picture.data).decode()
        return {"data": f"data:image/{kind};base64,{encoded}", "sha256": picture.sha256}
    return {"path": _relative(picture.path, folder), "sha256": picture.sha256}


def _is_unchanged(picture: Picture) -> bool:
    try:
        return picture.path is not None and read_regular(picture.path, MAX_FILE_BYTES) == picture.data
    except OSError:
        return False


def _format(data: bytes) -> str:
    from PIL import Image

    return str(Image.open(io.BytesIO(data)).format).lower()


def _relative(path: Path, folder: Path) -> str:
    """Relative, with forward slashes, at or below the folder; absolute elsewhere."""
    for inner in (path, path.resolve()):
        if inner.is_relative_to(folder):
            return inner.relative_to(folder).as_posix()
    return str(path)


def _is_conversation(path: Path) -> bool:
    """Whether a file says that it is a saved conversation. Raises OSError."""
    with open_regular(path) as file:
        head = file.read(HEAD_BYTES)
    return head.removeprefix(BOM_UTF8).lstrip().startswith(b"{") and f'"{FORMAT}"'.encode() in head


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _whole_text(value: Any) -> str:
    """Text without halves of characters, which no tokenizer takes. Raises TypeError, ValueError."""
    return _text(value).encode().decode()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

"""A conversation as state: its turns, the images that wait for the next message, and its file.

Knows messages, image files and JSON; no terminal, no model. A picture is its file's bytes as they were when it
was named, so that a screenshot that is overwritten or deleted later stays what was spoken of.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllava.errors import InputError
from pocketllava.models import Bundle
from pocketllava.models.files import atomic_write
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.types import Message, Timings
from pocketllava.vision.image import FORMATS, MAX_PIXELS, load, resize_and_crop

FORMAT, VERSION = "pocketllava conversation", 1
HEAD_BYTES = 4096  # in which a file of ours says what it is


@dataclass(frozen=True)
class Picture:
    """An image that was decoded once. path is None for one that came as a data URI; size: (width, height)."""

    data: bytes
    size: tuple[int, int]
    path: Path | None = None

    @property
    def name(self) -> str:
        """What to call it."""
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
    """A turn that is to be answered: number `at` of the conversation, in the place of any that is there."""

    turn: Turn
    at: int


class Gallery:
    """Opens images as the model will see them, so that one that is broken is told before it is spoken of."""

    def __init__(self, how: Preprocessing, max_pixels: int = MAX_PIXELS) -> None:
        self._how, self._max_pixels = how, max_pixels

    def open(self, source: str | os.PathLike[str]) -> Picture:
        """A path or a data URI -> Picture. Raises ImageError."""
        image = load(source, self._max_pixels)
        resize_and_crop(image, self._how)
        if isinstance(source, str) and source[:5].lower() == "data:":
            return Picture(base64.b64decode(source.partition(",")[2]), image.size)
        path = Path(source).expanduser().absolute()
        return Picture(path.read_bytes(), image.size, path.resolve() if ".." in path.parts else path)


class Dialogue:
    """A conversation that changes only by whole turns: what fails leaves it as it was."""

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
        shown = [(p, n) for n, turn in enumerate(self.turns, 1) for p in turn.pictures]
        return [*shown, *((p, None) for p in self.waiting)]

    def show(self, pictures: Sequence[Picture]) -> list[int]:
        """Let images wait for the next message; returns their numbers. One that waits already keeps its own."""
        self.waiting += [p for p in dict.fromkeys(pictures) if p not in self.waiting]
        first = len(self.pictures) - len(self.waiting) + 1
        return [first + self.waiting.index(p) for p in pictures]

    def question(self, text: str, pictures: Sequence[Picture] = ()) -> Question:
        """The next turn: a text about the images that wait, and these."""
        return Question(Turn(text, tuple(dict.fromkeys([*self.waiting, *pictures]))), len(self.turns))

    def again(self) -> Question:
        """The question that got no answer, or else the last one. Raises InputError if there is none."""
        if self.unanswered is None and not self.turns:
            raise InputError("/retry: no question yet")
        return self.unanswered or Question(self.turns[-1], len(self.turns) - 1)

    def messages(self, question: Question | None = None) -> list[Message]:
        """What the model is given: the conversation up to a question, and that, or all of it."""
        turns = self.turns if question is None else self.turns[: question.at]
        found = [Message("system", self.system)] if self.system else []
        for turn in turns:
            found += [_asked(turn), Message("assistant", turn.answer)]
        return found if question is None else [*found, _asked(question.turn)]

    def answered(self, question: Question, answer: str, timings: Timings | None = None) -> None:
        """Take a question and its answer, whole or cut short, into the conversation."""
        turn = question.turn
        self.turns[question.at :] = [Turn(turn.text, turn.pictures, answer)]
        self.waiting = [p for p in self.waiting if p not in turn.pictures]
        self.unanswered, self.timings = None, timings or self.timings

    def failed(self, question: Question) -> None:
        """Remember a question that got no answer, for again(); the conversation is as before."""
        self.unanswered = question

    def to_prepare(self) -> tuple[list[bytes], list[Message]] | None:
        """The images to evaluate ahead, and the messages before them: those that wait, or were shown last."""
        if self.waiting:
            return [p.data for p in self.waiting], self.messages()
        for at in range(len(self.turns) - 1, -1, -1):
            if self.turns[at].pictures:
                turn = self.turns[at]
                return [p.data for p in turn.pictures], self.messages(Question(turn, at))[:-1]
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
            if path.exists() and not _is_ours(path):
                raise InputError(
                    f"{path}: a file that is no saved conversation, left as it is; take another name"
                )
            text = json.dumps(self._to_json(path.parent), ensure_ascii=False, indent=1)
            with atomic_write(path) as part:
                part.write_bytes(text.encode("utf-8", "surrogateescape"))
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: cannot be written ({_reason(error)})") from error
        self.file = path

    def load(self, path: Path) -> str:
        """Take up a saved conversation in the place of this one; returns the model it was held with.

        Raises InputError, with this conversation as it was, for another file or images that are not as they were.
        """
        try:
            path = path.resolve()
            if not _is_ours(path):
                raise InputError(f"{path}: not a conversation that /save wrote")
            found = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: cannot be read ({_reason(error)})") from error
        if found.get("version") != VERSION:
            raise InputError(f"{path}: found version {found.get('version')!r}, expected {VERSION}")
        try:
            system, model = _sendable(found["system"]), _text(found["model"])
            turns = self._turns(path, found["messages"])
            waiting = [self._picture(path, entry) for entry in found["waiting"]]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise InputError(f"{path}: not a whole conversation ({error!r}); save it again") from error
        self.clear()
        self.system, self.turns, self.waiting, self.file = system, turns, waiting, path
        return model

    def _to_json(self, folder: Path) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            shown = [_reference(p, folder) for p in turn.pictures]
            messages.append({"role": "user", "text": turn.text, "images": shown})
            messages.append({"role": "assistant", "text": turn.answer})
        head = {"format": FORMAT, "version": VERSION, "model": self.model, "system": self.system}
        return {**head, "messages": messages, "waiting": [_reference(p, folder) for p in self.waiting]}

    def _turns(self, path: Path, messages: Any) -> list[Turn]:
        roles = [message["role"] for message in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError("the roles do not alternate between user and assistant")
        return [
            Turn(
                _sendable(asked["text"]),
                tuple(self._picture(path, entry) for entry in asked.get("images", ())),
                _sendable(answered["text"]),
            )
            for asked, answered in zip(messages[::2], messages[1::2], strict=True)
        ]

    def _picture(self, path: Path, entry: Any) -> Picture:
        """The image that an entry refers to. Raises ImageError if it is gone, InputError if it changed."""
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
    return f"{m.source.id} {types} {m.files['model.gguf'].sha256[:12]}"


def _asked(turn: Turn) -> Message:
    return Message("user", turn.text, tuple(p.data for p in turn.pictures))


def _reference(picture: Picture, folder: Path) -> dict[str, str]:
    """How a file in this folder names a picture: by a path while that holds the same bytes, else by its bytes."""
    if picture.path is None or not _still_there(picture):
        kind = _format(picture.data)
        encoded = base64.b64encode(picture.data).decode()
        return {"data": f"data:image/{kind};base64,{encoded}", "sha256": picture.sha256}
    return {"path": _relative(picture.path, folder), "sha256": picture.sha256}


def _still_there(picture: Picture) -> bool:
    try:
        return picture.path is not None and picture.path.read_bytes() == picture.data
    except OSError:
        return False


def _format(data: bytes) -> str:
    from PIL import Image

    return str(Image.open(io.BytesIO(data), formats=FORMATS).format).lower()


def _relative(path: Path, folder: Path) -> str:
    """Relative, with forward slashes, for what lies at or below the folder; absolute for the rest."""
    for inner in (path, path.resolve()):
        if inner.is_relative_to(folder):
            return inner.relative_to(folder).as_posix()
    return str(path)


def _is_ours(path: Path) -> bool:
    """Whether a file says that it is a saved conversation. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return head.lstrip().startswith(b"{") and f'"{FORMAT}"'.encode() in head


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _sendable(value: Any) -> str:
    """Text that a tokenizer takes: no halves of characters. Raises TypeError, ValueError."""
    return _text(value).encode().decode()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

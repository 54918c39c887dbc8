"""What an album knows of each picture, and of each question that was asked about all of them. Knows no model.

A picture is a path below the album's root, with its size, time of change and content; a question is a prompt and
everything else that an answer depends on, so that another prompt or model is another column of answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pocketllava.album import database as db
from pocketllava.errors import InputError

SYNC_S = 2.0  # the most that a power cut may take
UNREAD = ""  # the content of a picture that could not be read


@dataclass(frozen=True)
class Question:
    """A column of answers. options: all but the defaults. id: its place in an album."""

    name: str
    prompt: str
    options: Mapping[str, Any]
    model: str
    model_sha256: str
    id: int = 0

    @property
    def identity(self) -> str:
        """What tells it from others: equal ones get equal answers."""
        values = [self.prompt, self.options, self.model_sha256]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Picture:
    """A file as it was when it was looked at; size and mtime_ns are -1 where it is gone."""

    path: str
    size: int
    mtime_ns: int
    sha256: str = UNREAD
    id: int = 0


@dataclass(frozen=True)
class Given:
    """An answer, or why there is none. asked: the prompt, if it names the picture. mark: what is wrong."""

    text: str | None = None
    record: str | None = None
    tokens: int = 0
    finish_reason: str | None = None
    mark: str = ""
    seconds: float = 0.0
    error: str | None = None
    pixels: str | None = None
    asked: str = ""


@dataclass(frozen=True)
class Row:
    """An answer with its picture, as search and exports show it. file: where the picture is on this machine."""

    path: str
    file: Path
    sha256: str
    question: Question
    given: Given
    id: int = 0  # the picture's, where the row was read from the album


_GIVEN = tuple(Given.__dataclass_fields__)
_COLUMNS = ", ".join(f"a.{name}" for name in _GIVEN)


class Album:
    """An album's file, open. To be used by one thread at a time."""

    def __init__(self, path: Path, *, root: str | None = None) -> None:
        """root: the folder of its pictures, for one that is new. Raises InputError."""
        self.path = path
        self.database = db.connect(path, create=root is not None)
        self._synced_s = time.monotonic()
        with db.database_errors(path):
            self.root = self._root(root)

    def close(self) -> None:
        """Have all of it in the one file."""
        self.database.close()

    def __enter__(self) -> Album:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def relative(self, path: str) -> str:
        """A picture's path as it is stored: below the root, with /; whole where it lies elsewhere."""
        start = os.path.join(self.root, "")  # noqa: PTH118
        return (path[len(start) :] if path.startswith(start) else path).replace(os.sep, "/")

    def file(self, path: str) -> Path:
        """Where a stored path is."""
        return Path(self.root) / path

    def add_question(self, question: Question) -> Question:
        """The question with its place in the album."""
        values = (
            question.identity, question.name, question.prompt, json.dumps(question.options), question.model,
            question.model_sha256,
        )  # fmt: skip
        self.database.execute(
            "INSERT INTO questions (identity, name, prompt, options, model, model_sha256) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (identity) DO UPDATE SET name = excluded.name", values
        )  # fmt: skip
        found = self.database.execute("SELECT id FROM questions WHERE identity = ?", (question.identity,))
        return replace(question, id=int(found.fetchone()[0]))

    def questions(self) -> list[Question]:
        """Its columns, the oldest first."""
        rows = self.database.execute(
            "SELECT name, prompt, options, model, model_sha256, id FROM questions ORDER BY id"
        )
        return [Question(name, prompt, json.loads(options), *rest) for name, prompt, options, *rest in rows]

    def question(self, name: str | None) -> Question:
        """A column by its name or number; without one, the only column. Raises InputError."""
        questions = self.questions()
        chosen = [q for q in questions if name is None or name in (q.name, str(q.id))]
        if len(chosen) == 1:
            return chosen[0]
        listed = "; ".join(f"{q.id} {q.name!r} ({q.model})" for q in questions) or "none"
        raise InputError(
            f"{self.path}: found {len(chosen)} columns{f' named {name!r}' if name else ''}, expected one; choose one"
            f" with --column: {listed}"
        )

    def known(self, picture: Picture, *, with_errors: bool) -> dict[int, bool]:
        """The questions that are answered for a picture that did not change: id -> whether it failed."""
        found = self.picture(picture.path)
        if found is None or (found.size, found.mtime_ns) != (picture.size, picture.mtime_ns):
            return {}
        rows = self.database.execute(
            "SELECT question, error IS NOT NULL FROM answers WHERE picture = ? AND sha256 = ?",
            (found.id, found.sha256),
        )
        return {question: bool(failed) for question, failed in rows if with_errors or not failed}

    def add_picture(self, picture: Picture, *, may_be_moved: bool = True) -> Picture:
        """The picture with its place in the album: its own, or that of the same content whose file is gone."""
        with db.transaction(self.database):
            found = self.picture(picture.path)
            if found is None and may_be_moved:
                found = self._moved(picture)
            values = (_stored(picture.path), picture.size, picture.mtime_ns, picture.sha256)
            if found is None:
                done = self.database.execute(
                    "INSERT INTO pictures (path, size, mtime_ns, sha256) VALUES (?, ?, ?, ?)", values
                )
                return replace(picture, id=int(done.lastrowid or 0))
            if found != replace(picture, id=found.id):
                self.database.execute(
                    "UPDATE pictures SET path = ?, size = ?, mtime_ns = ?, sha256 = ? WHERE id = ?",
                    (*values, found.id),
                )
            return replace(picture, id=found.id)

    def same(self, question: Question, sha256: str, asked: str) -> Given | None:
        """An answer about the same bytes."""
        return self._given("a.question = ? AND a.sha256 = ? AND a.asked = ?", question.id, sha256, asked)

    def alike(self, question: Question, pixels: str, asked: str) -> Given | None:
        """An answer about the same pixels."""
        where = "a.question = ? AND a.pixels = ? AND a.asked = ? AND a.error IS NULL"
        return self._given(where, question.id, pixels, asked)

    def put(self, picture: Picture, question: Question, given: Given) -> None:
        """Keep an answer, in the place of an older one."""
        with db.transaction(self.database):
            self.database.execute(
                "DELETE FROM answers WHERE picture = ? AND question = ?", (picture.id, question.id)
            )
            values = {
                "picture": picture.id,
                "question": question.id,
                "sha256": picture.sha256,
                **asdict(given),
            }
            self.database.execute(
                f"INSERT INTO answers ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
                tuple(values.values()),
            )
        if time.monotonic() - self._synced_s > SYNC_S:
            db.sync(self.database)
            self._synced_s = time.monotonic()

    def rows(
        self, question: Question | None = None, where: str = "", values: Sequence[Any] = ()
    ) -> Iterator[Row]:
        """Answers of pictures as they are now, errors included, by their paths; where: SQL on p and a."""
        only = f"AND a.question = {question.id}" if question else ""
        order = "" if "ORDER BY" in where else "ORDER BY p.path, a.question"
        questions = {q.id: q for q in self.questions()}
        found = self.database.execute(
            f"SELECT p.id, p.path, p.sha256, a.question, {_COLUMNS} FROM pictures p JOIN answers a"
            f" ON a.picture = p.id AND a.sha256 = p.sha256 {only} {where} {order}", values
        )  # fmt: skip
        for picture, path, sha256, asked, *rest in found:
            path = _path(path)
            yield Row(path, self.file(path), sha256, questions[asked], Given(*rest), picture)

    @property
    def newest(self) -> int:
        """The answer that was put last; rows with a greater a.id came after it."""
        return int(self.database.execute("SELECT coalesce(max(id), 0) FROM answers").fetchone()[0])

    def count(self, question: Question, *, failed: bool = False) -> int:
        """How many pictures have an answer to a question; or failed."""
        found = self.database.execute(
            "SELECT count(*) FROM pictures p JOIN answers a ON a.picture = p.id AND a.sha256 = p.sha256"
            " WHERE a.question = ? AND (a.error IS NOT NULL) = ?", (question.id, failed)
        )  # fmt: skip
        return int(found.fetchone()[0])

    def answer(self, picture: Picture, question: Question) -> Given | None:
        """What is known of a picture and a question."""
        where = "a.picture = ? AND a.question = ? AND a.sha256 = ?"
        return self._given(where, picture.id, question.id, picture.sha256)

    def _given(self, where: str, *values: object) -> Given | None:
        found = self.database.execute(
            f"SELECT {_COLUMNS} FROM answers a WHERE {where} LIMIT 1", values
        ).fetchone()
        return Given(*found) if found else None

    def picture(self, path: str) -> Picture | None:
        """What is known of a path."""
        found = self.database.execute(
            "SELECT path, size, mtime_ns, sha256, id FROM pictures WHERE path = ?", (_stored(path),)
        ).fetchone()
        return Picture(_path(found[0]), *found[1:]) if found else None

    def _moved(self, picture: Picture) -> Picture | None:
        if picture.sha256 == UNREAD:
            return None
        rows = self.database.execute(
            "SELECT path, size, mtime_ns, sha256, id FROM pictures WHERE sha256 = ?", (picture.sha256,)
        )
        others = (Picture(_path(path), *rest) for path, *rest in rows)
        return next((other for other in others if not os.path.lexists(self.file(other.path))), None)

    def _root(self, root: str | None) -> str:
        """The folder of the pictures. It is stored relative to the album, so that both can be moved together."""
        folder = self.path.absolute().parent
        found = self.database.execute("SELECT root FROM album").fetchone()
        if found is None:
            found = (_relative_root(root if root is not None else str(folder), folder),)
            with db.transaction(self.database):
                self.database.execute(
                    "INSERT INTO album SELECT ? WHERE NOT EXISTS (SELECT * FROM album)", found
                )
        return os.path.normpath(folder / _path(found[0]))


def _relative_root(root: str, folder: Path) -> Any:
    try:
        return _stored(os.path.relpath(root, folder))
    except ValueError:  # another drive
        return _stored(root)


def _stored(path: str) -> str | bytes:
    """A path as SQLite takes it: one that is not UTF-8 as its bytes."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


def _path(stored: str | bytes) -> str:
    return os.fsdecode(stored)

"""Albums of several machines or shards -> one. Knows the journal; no files of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pocketllava.album import database as db
from pocketllava.album.journal import Album, Picture
from pocketllava.errors import InputError

AT_ONCE = 1000


@dataclass(frozen=True)
class Merged:
    """What came from one album: answers that are new, and those that were there."""

    added: int
    known: int


def merge(album: Album, path: Path) -> Merged:
    """Take over all that another album knows; an answer replaces an error, nothing else is replaced."""
    if path.exists() and album.path.exists() and path.samefile(album.path):
        raise InputError(f"{path}: found the album that the others go into, expected another")
    with Album(path) as other, db.database_errors(album.path):
        merged = _answers(album, other)
        _features(album, other)
        db.sync(album.database)
    return merged


def _answers(album: Album, other: Album) -> Merged:
    questions = {q.id: album.add_question(q) for q in other.questions()}
    added = known = 0
    states: dict[str, Picture] = {}
    for row in other.rows():
        if row.path not in states:
            states = {row.path: _taken(album, other, row.path)}
        picture, question = states[row.path], questions[row.question.id]
        have = album.answer(picture, question)
        if picture.sha256 != row.sha256 or (
            have is not None and (have.error is None or row.given.error is not None)
        ):
            known += 1
            continue
        album.put(picture, question, row.given)
        added += 1
    return Merged(added, known)


def _taken(album: Album, other: Album, path: str) -> Picture:
    """A picture of the other album in this one; this one's is the newer where both know it."""
    here, there = album.picture(path), other.picture(path)
    assert there is not None  # it has answers
    if here is not None and here.mtime_ns >= there.mtime_ns and here.sha256:
        return here
    return album.add_picture(there, may_be_moved=False)


def _features(album: Album, other: Album) -> None:
    rows = other.database.execute("SELECT pixels, tower, mean FROM features ORDER BY id")
    while some := rows.fetchmany(AT_ONCE):
        with db.transaction(album.database):
            album.database.executemany(
                "INSERT OR IGNORE INTO features (pixels, tower, mean) VALUES (?, ?, ?)", some
            )

"""An album for readers elsewhere: hits by words, by order or by likeness, and its pictures by their number.

Knows an album and Pillow's decoders; no HTTP, no model. Every answer is bounded, and of the disk it gives nothing but
pictures whose bytes are those that were asked about.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from pocketllava.album import alike, search
from pocketllava.album.database import database_errors
from pocketllava.album.journal import Album, Question, Row
from pocketllava.errors import InputError
from pocketllava.models.files import read_regular, utf8
from pocketllava.types import MAX_FILE_BYTES
from pocketllava.vision.decoding import open_header, pillow_errors
from pocketllava.vision.image import Picture

SEARCH_S = 10.0  # for one search; 100,000 pictures by likeness take 0.9 s
STEPS = 10_000  # of SQLite's machine between two looks at the clock
MAX_HITS = 200
MAX_CAPTION = 2000  # characters
_BY_PATH = "a.error IS NULL ORDER BY p.path LIMIT ?"
_FIRST_ANSWER = (
    "a.question = (SELECT min(question) FROM answers WHERE picture = p.id AND sha256 = p.sha256"
    " AND error IS NULL)"
)
THUMBNAIL = (320, 320)  # pixels at most; it is shown at half of that


@dataclass(frozen=True)
class Hit:
    """A picture that was found, and what was answered about it. likeness: 1 at most; None for words."""

    id: int
    path: str
    caption: str
    question: str
    mark: str | None
    likeness: float | None


@dataclass(frozen=True)
class Facts:
    """What an album holds."""

    name: str
    pictures: int
    questions: tuple[Question, ...]


class Gallery:
    """An album's file, for several threads: each call opens it anew, and a run may write it meanwhile."""

    def __init__(self, path: Path) -> None:
        """Raises InputError for what is no album."""
        self.path = path
        self.facts()

    def facts(self) -> Facts:
        """Its name, how many pictures it knows, and its columns."""
        with self._opened() as album:
            (n,) = album.database.execute("SELECT count(*) FROM pictures").fetchone()
            return Facts(self.path.stem, n, tuple(album.questions()))

    def by_words(self, words: str, column: int | None, limit: int) -> list[Hit]:
        """What `find` finds, the best first."""
        with self._opened() as album:
            rows = search.found(album, words, question=_column(album, column), limit=limit)
            return _hits((row, None) for row in rows)

    def first(self, column: int | None, limit: int) -> list[Hit]:
        """Pictures by their paths, for someone who has not searched yet."""
        with self._opened() as album:
            where = f"WHERE {_BY_PATH}" if column is not None else f"WHERE {_FIRST_ANSWER} AND {_BY_PATH}"
            rows = album.rows(_column(album, column), where, (limit,))
            return _hits((row, None) for row in rows)

    def like(self, picture: int, limit: int) -> list[Hit]:
        """Pictures that look like one of its own, which comes first. Raises InputError."""
        with self._opened() as album:
            features = search.features_of(album, self._row(album, picture).sha256)
            if features is None:
                raise InputError(f"like: the features of picture {picture} were not kept (--no-like)")
            return _hits(search.alike_rows(album, *features, limit))

    def like_bytes(self, data: bytes, limit: int) -> list[Hit] | None:
        """The same for a picture that may be another; None where its features are not known."""
        with self._opened() as album:
            features = search.features_of(album, hashlib.sha256(data).hexdigest())
            return None if features is None else _hits(search.alike_rows(album, *features, limit))

    def like_features(self, tower: str, mean: alike.Vector, limit: int) -> list[Hit]:
        """The same for features that a model has computed. Raises InputError for another model's."""
        with self._opened() as album:
            if tower not in {question.model_sha256 for question in album.questions()}:
                raise InputError(
                    "like: the album was made with another model than the one that is served, whose features"
                    " cannot be compared; choose a picture of the album"
                )
            return _hits(search.alike_rows(album, tower, alike.unit(mean), limit))

    def picture(self, picture: int) -> tuple[bytes, str]:
        """(the bytes, their SHA-256) of a picture, as they were asked about. Raises InputError where they changed."""
        with self._opened() as album:
            row = self._row(album, picture)
        try:
            data = read_regular(row.file, MAX_FILE_BYTES)
        except (OSError, ValueError):
            data = b""
        if hashlib.sha256(data).hexdigest() != row.sha256:
            raise InputError(f"picture {picture}: it is gone, or was changed since it was asked about")
        return data, row.sha256

    def _row(self, album: Album, picture: int) -> Row:
        rows = album.rows(None, "WHERE p.id = ? AND a.error IS NULL ORDER BY a.question LIMIT 1", (picture,))
        for row in rows:
            return row
        raise InputError(f"picture {picture}: found none of this number in the album")

    @contextmanager
    def _opened(self) -> Iterator[Album]:
        """The album, for a while. Its place on the disk stays out of errors."""
        end = time.monotonic() + SEARCH_S
        try:
            with Album(self.path) as album, database_errors(self.path):
                album.database.set_progress_handler(lambda: time.monotonic() > end, STEPS)
                yield album
        except InputError as error:
            raise type(error)(str(error).replace(str(self.path), self.path.name)) from error
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
        ) as error:  # SQLite keeps any type anywhere
            raise InputError(
                f"{self.path.name}: damaged, found values that no album has ({error})"
            ) from error


def thumbnail(data: bytes) -> bytes:
    """A small JPEG of a picture, the right side up. Raises ImageError."""
    with pillow_errors("picture"):
        image, orientation = open_header(data, "picture")
        image.draft("RGB", THUMBNAIL)  # a JPEG is decoded at an eighth of its size where that is enough
        image.load()
        small = Picture.of(image, orientation).rgb().copy()
        small.thumbnail(THUMBNAIL, Image.Resampling.BILINEAR, reducing_gap=2.0)
        file = io.BytesIO()
        small.save(file, "JPEG", quality=80)
        return file.getvalue()


def kind_of(data: bytes) -> str:
    """The content type of a picture's bytes. Raises ImageError for what is none."""
    with pillow_errors("picture"):
        image, _ = open_header(data, "picture")
        return Image.MIME.get(image.format or "", "application/octet-stream")


def _column(album: Album, column: int | None) -> Question | None:
    return None if column is None else album.question(str(column))


def _hits(rows: Iterable[tuple[Row, float | None]]) -> list[Hit]:
    """One a picture, with its first row's answer."""
    hits: dict[int, Hit] = {}
    for row, likeness in rows:
        if row.id not in hits:
            hits[row.id] = _hit(row, likeness)
    return list(hits.values())


def _hit(row: Row, likeness: float | None) -> Hit:
    given = row.given
    caption, mark = str(given.text or "")[:MAX_CAPTION], str(given.mark) if given.mark else None
    return Hit(row.id, _shown(row.path), caption, str(row.question.prompt), mark, likeness)


def _shown(path: str) -> str:
    """A path below the album's folder as it is; of one elsewhere the name."""
    parts = PurePosixPath(path)
    is_inside = not Path(path).is_absolute() and ".." not in parts.parts
    return utf8(path if is_inside else parts.name)

"""Words -> the pictures whose answers hold them, the best first. The one file that knows FTS5's language.

Words must all be there, in any order; "several words" in quotes stand together, word* begins a word, and AND, OR,
NOT, NEAR and brackets are FTS5's own. Case and accents do not count.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator

from pocketllava.album import alike
from pocketllava.album.database import database_errors
from pocketllava.album.journal import Album, Question, Row
from pocketllava.errors import InputError

MAX_WORDS = 1000  # characters
_PART = re.compile(r'"(?:[^"]|"")*"\s?\*?|\b(?:AND|OR|NOT)\b|NEAR\([^()]*\)|[()]|[^\s()"]+|"')
ANY = "a.question IN (SELECT id FROM questions)"  # so that SQLite takes an index that begins with it
_OPERATORS = ("AND", "OR", "NOT", "(", ")")


def fts5_query(text: str) -> str:
    """What a person types, as FTS5 takes it: words with signs in them are quoted."""
    if len(text) > MAX_WORDS:
        raise InputError(f"words: found {len(text)} characters, expected at most {MAX_WORDS}")
    parts = [_quoted(part) for part in _PART.findall(text.replace("\0", " "))]
    if not any(parts):
        raise InputError("words: found none, expected words to look for")
    return " ".join(parts)


def found(album: Album, text: str, *, question: Question | None = None, limit: int = 20) -> Iterator[Row]:
    """Answers that match, by FTS5's rank (BM25). Raises InputError for a query that is none."""
    query = fts5_query(text)
    where = "JOIN words ON words.rowid = a.id WHERE words MATCH ? ORDER BY words.rank, p.path LIMIT ?"
    with database_errors(album.path):
        try:
            yield from album.rows(question, where, (query, limit))
        except sqlite3.OperationalError as error:
            if "fts5" not in str(error) and "unterminated" not in str(error):
                raise
            raise InputError(
                f"words: {text!r} cannot be looked for ({error}); close quotes and brackets, and put AND, OR and NOT"
                " between words"
            ) from error


def alike_rows(album: Album, tower: str, wanted: alike.Vector, limit: int) -> Iterator[tuple[Row, float]]:
    """Pictures that look like one, with their likeness, 1 at most; each with its first answer."""
    with database_errors(album.path):
        for pixels, cosine in alike.nearest(album, tower, wanted, limit):
            seen: set[str] = set()
            for row in album.rows(None, f"WHERE a.pixels = ? AND {ANY}", (pixels,)):
                if row.path not in seen:
                    seen.add(row.path)
                    yield row, cosine


def features_of(album: Album, sha256: str) -> tuple[str, alike.Vector] | None:
    """(tower, the features kept) of a picture's bytes, if the album knows them."""
    with database_errors(album.path):
        found = album.database.execute(
            "SELECT q.model_sha256, a.pixels FROM questions q JOIN answers a ON a.question = q.id"
            " JOIN features f ON f.tower = q.model_sha256 AND f.pixels = a.pixels WHERE a.sha256 = ? LIMIT 1",
            (sha256,),
        ).fetchone()
        kept = found and alike.get(album, found[1], found[0])
    return None if kept is None else (found[0], kept)


def _quoted(part: str) -> str:
    if part in _OPERATORS or part.startswith(("NEAR(", '"')):
        return part
    word, star = (part[:-1], "*") if part.endswith("*") else (part, "")
    return f'"{word}"{star}' if word else ""

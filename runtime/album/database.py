"""An album's file: SQLite, its tables, its migrations; what it refuses to open. Knows no pictures and no model.

Every answer is committed at once, which a killed process cannot lose (WAL); what a power cut may take with it is
bounded by `sync()`, which is called every few seconds.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from urllib.parse import quote

from pocketllava.errors import InputError

APPLICATION_ID = 0x504C4C41  # "PLLA"; `file` and others show it
MAGIC = b"SQLite format 3\0"
WAIT_S = 60.0  # for another process that writes; several shards may share an album on one machine
# Each script makes one version from the one before; user_version says how many were run.
MIGRATIONS = (
    """
    CREATE TABLE album (root TEXT NOT NULL);
    CREATE TABLE pictures (
        id INTEGER PRIMARY KEY, path NOT NULL UNIQUE, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
        sha256 TEXT NOT NULL);
    CREATE INDEX pictures_by_content ON pictures (sha256);
    CREATE TABLE questions (
        id INTEGER PRIMARY KEY, identity TEXT NOT NULL UNIQUE, name TEXT NOT NULL, prompt TEXT NOT NULL,
        options TEXT NOT NULL, model TEXT NOT NULL, model_sha256 TEXT NOT NULL);
    CREATE TABLE answers (
        id INTEGER PRIMARY KEY, picture INTEGER NOT NULL REFERENCES pictures, question INTEGER NOT NULL
        REFERENCES questions, sha256 TEXT NOT NULL, asked TEXT NOT NULL, pixels TEXT, text TEXT, record TEXT,
        tokens INTEGER, finish_reason TEXT, mark TEXT, seconds REAL, error TEXT, UNIQUE (picture, question));
    CREATE INDEX answers_by_content ON answers (question, sha256);
    CREATE INDEX answers_by_pixels ON answers (question, pixels);
    CREATE VIRTUAL TABLE words USING fts5 (
        text, content = 'answers', content_rowid = 'id', tokenize = 'unicode61 remove_diacritics 2', prefix = '2 3');
    CREATE TRIGGER answer_added AFTER INSERT ON answers BEGIN
        INSERT INTO words (rowid, text) VALUES (new.id, new.text); END;
    CREATE TRIGGER answer_removed AFTER DELETE ON answers BEGIN
        INSERT INTO words (words, rowid, text) VALUES ('delete', old.id, old.text); END;
    """,
    """
    CREATE TABLE features (
        id INTEGER PRIMARY KEY, pixels TEXT NOT NULL, tower TEXT NOT NULL, mean BLOB NOT NULL,
        UNIQUE (tower, pixels));
    """,
)
_REASONS = {
    "full": "the disk is full; free some space, the album is whole and the same command goes on",
    "disk I/O": "the disk failed, or is full; see to it, the album is whole and the same command goes on",
    "readonly": "it cannot be written; give --album a place that can",
    "open": "it cannot be opened or made; give --album a place that can be written",
    "malformed": "it is damaged; restore it from a copy, or caption into a new --album",
    "not a database": "it is no SQLite file, expected an album; give --album another name",
    "locked": "another process has been writing it for a minute; try again when that has ended",
    "interrupted": "the search took too long; look for something rarer",
    "fts5": "this Python's SQLite lacks full text search (FTS5); take a Python that has it",
}


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Whatever SQLite raises inside the block is an InputError of one line, which names the album."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        reason = next((words for key, words in _REASONS.items() if key in text), text)
        raise InputError(f"{path}: {reason} (SQLite: {text})") from error


def connect(path: Path, *, create: bool = False) -> sqlite3.Connection:
    """An album's database, in its newest version. Raises InputError for any other file, and where there is none."""
    exists = _checked(path, create)
    with database_errors(path):
        try:
            return _opened(path, str(path), exists)
        except sqlite3.OperationalError:
            if create or not exists or path.with_name(path.name + "-wal").exists():
                raise
        # in a folder that cannot be written, which WAL would need to be, it can be read as long as nobody writes
        return _opened(path, f"{uri(path.absolute())}?mode=ro&immutable=1", exists, writable=False)


def sync(database: sqlite3.Connection) -> None:
    """Have everything on the disk, as far as other readers allow."""
    database.execute("PRAGMA wal_checkpoint(PASSIVE)")


def uri(path: PurePath) -> str:
    """An absolute path as SQLite takes it: no authority, which Path.as_uri makes of a Windows server's name."""
    name = quote(path.as_posix())
    return f"file://{'' if name.startswith('/') else '/'}{name}"


def _opened(path: Path, name: str, exists: bool, *, writable: bool = True) -> sqlite3.Connection:
    database = sqlite3.connect(
        name, timeout=WAIT_S, isolation_level=None, check_same_thread=False, uri=not writable
    )
    try:
        if exists:
            _check_kind(database, path)
        if writable:
            _prepare(database)
    except BaseException:
        database.close()
        raise
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All of the block's changes, or none."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if database.in_transaction:  # SQLite itself rolls back when the disk is full
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _checked(path: Path, create: bool) -> bool:
    """Whether the file exists. Raises InputError for what SQLite should not even open."""
    try:
        if not path.exists():
            if not create:
                raise InputError(f"{path}: found nothing, expected an album that `pocketllava caption` made")
            return False
        if not path.is_file():
            raise InputError(f"{path}: found a folder or a device, expected an album's file")
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
    except OSError as error:
        raise InputError(f"{path}: cannot be read as an album ({error.strerror or error})") from error
    if head and head != MAGIC:
        raise InputError(f"{path}: found another kind of file, expected an album; give --album another name")
    return bool(head)


def _prepare(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA journal_mode = WAL")  # a file system that cannot says so, and keeps its journal
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute("PRAGMA foreign_keys = ON")
    if _version(database) < len(MIGRATIONS):
        with transaction(database):
            _migrate(database)


def _check_kind(database: sqlite3.Connection, path: Path) -> None:
    (kind,) = database.execute("PRAGMA application_id").fetchone()
    (n_tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if kind != APPLICATION_ID and (kind or n_tables):  # one that was killed while it was made is empty
        raise InputError(
            f"{path}: found another program's database, expected an album; give --album another name"
        )
    if (version := _version(database)) > len(MIGRATIONS):
        raise InputError(
            f"{path}: an album of version {version}, expected at most {len(MIGRATIONS)}; upgrade pocketllava"
        )


def _version(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _migrate(database: sqlite3.Connection) -> None:
    """Run the scripts that this file has not seen; another process may have, meanwhile."""
    for script in MIGRATIONS[_version(database) :]:
        statement = ""
        for line in script.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                database.execute(statement)
                statement = ""
    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")

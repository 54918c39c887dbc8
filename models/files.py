"""Atomic writes, and reading nothing but regular files: a stranger's folder may hold pipes, devices and links to them.

A file is written beside its final path, flushed to the disk, then renamed. Knows one path; nothing of the content.
(Bundles are folders: convert/write/staging.py.)
"""

from __future__ import annotations

import codecs
import errno
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from platformdirs import user_cache_path

from pocketllava.errors import InputError

PATIENCE_S = 2.0 if sys.platform == "win32" else 0.0
MAX_TEXT_BYTES = 256 << 20  # of a text to measure on, a list of questions or an evaluation set


def move(source: Path, target: Path) -> None:
    """Rename, in the place of a file that is there. Raises OSError.

    On Windows a virus scanner or an indexer may have either open for a moment after it was written.
    """
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
        time.sleep(PATIENCE_S / 40)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write to; it replaces `path` when the block ends without an exception.

    An older file under `path` stays until then. Each call has a hidden path of its own. Raises OSError.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield part
        with part.open("r+b") as file:  # a rename can reach the disk before the data does
            os.fsync(file.fileno())
        move(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked_write(path: Path) -> Iterator[Path]:
    """As atomic_write, for large files: what a killed process left is removed by the next one that writes `path`.

    The hidden path is always the same, and a lock says whether its writer is alive. Raises OSError, BlockingIOError
    where another process is writing `path`.
    """
    from filelock import FileLock, Timeout  # takes as long to import as the rest of the room

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(errno.EAGAIN, "another process is writing it") from None
    part = path.with_name(f".{path.name}.partial")
    try:
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        move(part, path)
    finally:
        part.unlink(missing_ok=True)
        with suppress(OSError):  # Windows removes it with its last handle
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def cache_folder() -> Path:
    """This user's cache folder on this platform. Raises InputError where there can be none."""
    folder = Path(user_cache_path("pocketllava", appauthor=False))
    try:
        if not folder.is_absolute():  # "~" of a user without a home stays as it is
            raise OSError(errno.ENOENT, "this user has no home folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be used as the cache folder ({error.strerror or error}); set HOME (or XDG_CACHE_HOME on"
            " Linux) to a folder that can be written"
        ) from error
    return folder


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with ~ replaced; as it is where ~ means nobody. Objects may give theirs as bytes."""
    plain = Path(os.fsdecode(path))
    try:
        return plain.expanduser()
    except (RuntimeError, ValueError):  # ValueError: no name at all, as with a NUL in it
        return plain


def utf8(name: str) -> str:
    """A file's name as a text that can be stored: bytes of it that are not UTF-8 are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def text_of(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 where its mark says so, as PowerShell's > writes it. Raises UnicodeDecodeError."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if marked else "utf-8-sig")


def open_regular(path: Path) -> BinaryIO:
    """A regular file, open for reading. Raises OSError for a pipe, a device or a folder, without waiting for either.

    The kind is asked before opening, which can already act on a device, and of the open file, which a name may by
    then no longer mean.
    """
    _check_kind(path.stat().st_mode)
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )  # a pipe would wait for a writer
    file = os.fdopen(os.open(path, flags), "rb")
    try:
        _check_kind(os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file


def read_regular(path: Path, max_bytes: int) -> bytes:
    """A regular file's bytes. Raises OSError for what is none, and for a file of more than max_bytes."""
    with open_regular(path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes > max_bytes:
            raise OSError(errno.EFBIG, f"found {n_bytes} bytes, expected at most {max_bytes}")
        return file.read(n_bytes)  # read() makes room for as many bytes as are asked for


def read_text(path: Path) -> str:
    """The text of a regular file of at most MAX_TEXT_BYTES. Raises OSError, UnicodeDecodeError."""
    text = text_of(read_regular(path, MAX_TEXT_BYTES))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_kind(mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    raise OSError(errno.EINVAL, f"found {kinds.get(stat.S_IFMT(mode), 'a device')}, expected a regular file")

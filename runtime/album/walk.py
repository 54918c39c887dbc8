"""Folders -> pictures' paths, one by one, in an order that is always the same. Opens no file.

A folder's names are held and sorted; of a million pictures in one folder that is 100 MB, of which nothing stays.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pocketllava.errors import InputError

EXTENSIONS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".heic", ".heif", ".avif",
)  # fmt: skip
PICTURE, FOLDER = "picture", "folder"
OnError = Callable[[str, OSError], None]


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, from 1 on: a picture's part depends on its path below the root alone."""

    index: int
    count: int

    def has(self, relative: str) -> bool:
        """Whether a picture is in this part."""
        digest = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index - 1


@dataclass(frozen=True)
class Walk:
    """Which pictures: those given, and those in the folders given; in folders in these too, if recursive."""

    paths: tuple[str, ...]
    recursive: bool = False

    def __post_init__(self) -> None:
        for path in self.paths:
            if not os.path.lexists(path):
                raise InputError(f"{path}: no such file or folder, expected pictures or folders of pictures")

    @property
    def root(self) -> str:
        """The folder that all of them are in."""
        folders = [path if Path(path).is_dir() else str(Path(path).parent) for path in self._absolute]
        try:
            return os.path.commonpath(folders)
        except ValueError:
            raise InputError("paths: found several drives, expected one; run them one by one") from None

    def folders(self, on_error: OnError | None = None) -> Iterator[tuple[str, list[str]]]:
        """Each folder and its pictures' names."""
        for path in self._absolute:
            if Path(path).is_dir():
                yield from _below(path, self.recursive, on_error or (lambda _path, _error: None))
            else:
                folder, name = os.path.split(path)
                yield folder, [name]

    def files(self, on_error: OnError | None = None) -> Iterator[str]:
        """The pictures."""
        for folder, names in self.folders(on_error):
            start = os.path.join(folder, "")  # noqa: PTH118 - a Path each would take ten times as long
            names.reverse()
            while names:  # those that were given out need not stay
                yield start + names.pop()

    def count(self, should_stop: Callable[[], bool]) -> Iterator[int]:
        """How many pictures there are, as far as was counted; holds no names."""
        total, todo = 0, list(self._absolute)
        while todo and not should_stop():
            path = todo.pop()
            if not Path(path).is_dir():
                total += 1
            else:
                with suppress(OSError), os.scandir(path) as entries:
                    for entry in entries:
                        kind = _kind(entry)
                        total += kind == PICTURE
                        if kind == FOLDER and self.recursive:
                            todo.append(entry.path)
            yield total

    @property
    def _absolute(self) -> Sequence[str]:
        return [os.path.abspath(path) for path in self.paths]  # noqa: PTH100 - resolve() would follow links


class Count:
    """Counts the pictures of a walk in a thread of its own."""

    def __init__(self, walk: Walk) -> None:
        self.found, self._stopped = 0, False
        self._thread = threading.Thread(target=self._run, args=(walk,), name="pocketllava count", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> None:
        """Until all are counted, but not for long."""
        self._thread.join(timeout_s)

    @property
    def done(self) -> bool:
        """Whether `found` is all of them."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Count no further."""
        self._stopped = True
        self._thread.join()

    def _run(self, walk: Walk) -> None:
        for found in walk.count(lambda: self._stopped):
            self.found = found


def _below(folder: str, recursive: bool, on_error: OnError) -> Iterator[tuple[str, list[str]]]:
    todo = [folder]
    while todo:
        folder = todo.pop()
        try:
            files, folders = _names(folder)
        except OSError as error:
            on_error(folder, error)
            continue
        if recursive:
            folders.sort(reverse=True)
            todo += [os.path.join(folder, name) for name in folders]  # noqa: PTH118
        if files:
            files.sort()
            yield folder, files


def _names(folder: str) -> tuple[list[str], list[str]]:
    """(pictures, folders) in a folder."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            kind = _kind(entry)
            if kind == PICTURE:
                files.append(entry.name)
            elif kind == FOLDER:
                folders.append(entry.name)
    return files, folders


def _kind(entry: os.DirEntry[str]) -> str:
    """Nothing hidden counts, and no link to a folder, which may lead back."""
    if entry.name.startswith("."):
        return ""
    if entry.name.lower().endswith(EXTENSIONS):
        return PICTURE
    return FOLDER if entry.is_dir(follow_symlinks=False) else ""

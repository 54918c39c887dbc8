"""Which answers are exported, and as which line of text. Knows rows; writes nothing."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pocketllava.album.journal import Row
from pocketllava.album.quality import CUT, RETRIED, whole_sentences
from pocketllava.album.words import SIDECARS, TAGS, filled, has_words, read_tags
from pocketllava.errors import InputError

Existing = Literal["skip", "overwrite", "append", "prepend"]
EXISTING = ("skip", "overwrite", "append", "prepend")


@dataclass(frozen=True)
class Style:
    """How a caption is written. marked: those that are cut, loops or refusals as well.

    prefix and suffix may hold a picture's words (album/words.py); tag_files: whose tags are meant.
    """

    prefix: str = ""
    suffix: str = ""
    sentence_end: bool = False
    marked: bool = False
    existing: Existing = "skip"
    tag_files: tuple[str, ...] = SIDECARS

    def caption(self, row: Row) -> str | None:
        """One line, None for an answer that is left out. Raises InputError for tags that cannot be read."""
        text, mark = row.given.text, row.given.mark
        if text is None or row.given.error is not None:
            return None
        if mark == CUT and self.sentence_end:
            text, mark = whole_sentences(text), ""
        if mark not in ("", RETRIED) and not self.marked:
            return None
        before, behind = self._around(row.file)
        return " ".join(f"{before}{text}{behind}".split())

    def _around(self, file: Path) -> tuple[str, str]:
        """Prefix and suffix with the picture's words."""
        both = (self.prefix, self.suffix)
        tags = read_tags(file, self.tag_files) if any(TAGS in text for text in both) else ""
        before, behind = (filled(text, file, tags) if has_words(text) else text for text in both)
        return before, behind


@dataclass
class Report:
    """What was written, and what was not. kept: files that were there already."""

    written: int = 0
    kept: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def chosen(self, rows: Iterable[Row], style: Style) -> Iterator[tuple[Row, str]]:
        """Rows with their captions; counts those that are left out."""
        for row in rows:
            try:
                caption = style.caption(row)
            except InputError as error:
                self.left_out["without tags that can be read"] += 1
                self.remarks = [str(error)]
                continue
            if caption is None:
                self.left_out["failed" if row.given.error is not None else row.given.mark] += 1
            else:
                yield row, caption


class Beside(ABC):
    """Writes a file beside each picture; a context manager."""

    def __init__(self, style: Style) -> None:
        self.style, self.report = style, Report()

    def add(self, row: Row) -> None:
        """Write a row's caption, unless it is left out. Raises InputError where it cannot be written."""
        if row.given.error is None and not row.file.exists():
            self.report.left_out["gone"] += 1
            return
        for _, caption in self.report.chosen([row], self.style):
            self.put(row, caption)

    @abstractmethod
    def put(self, row: Row, caption: str) -> None:
        """Write a caption, and count it in the report."""

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, *_: object) -> None:
        self.report.remarks += self.end()

    def end(self) -> list[str]:
        """After the last: remarks for the report."""
        return []


def check_target(target: Path, style: Style) -> None:
    """Raise InputError for a file that is there, unless it is to be overwritten, and for one that cannot be made."""
    if target.is_dir() or not target.parent.is_dir():
        kind = "a folder" if target.is_dir() else "no such folder"
        raise InputError(f"{target}: {kind}, expected a file's name in a folder that exists")
    if target.exists() and style.existing != "overwrite":
        raise InputError(f"{target}: exists; --existing overwrite replaces it")


def relative_to(row: Row, folder: Path) -> str:
    """A picture's path from a folder, with /. Raises InputError for one that lies outside it."""
    try:
        return Path(os.path.abspath(row.file)).relative_to(os.path.abspath(folder)).as_posix()  # noqa: PTH100
    except ValueError:
        raise InputError(
            f"{row.file}: outside {folder}, expected all pictures below the file that lists them; give --out a"
            " place above them"
        ) from None

"""Which answers are exported, and as which line of text. Knows rows; writes nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pocketllava.album.journal import Row
from pocketllava.album.quality import CUT, RETRIED, whole_sentences
from pocketllava.errors import InputError

Existing = Literal["skip", "overwrite", "append", "prepend"]
EXISTING = ("skip", "overwrite", "append", "prepend")


@dataclass(frozen=True)
class Style:
    """How a caption is written. marked: those that are cut, loops or refusals as well."""

    prefix: str = ""
    suffix: str = ""
    sentence_end: bool = False
    marked: bool = False
    existing: Existing = "skip"

    def caption(self, row: Row) -> str | None:
        """One line, None for an answer that is left out."""
        text, mark = row.given.text, row.given.mark
        if text is None or row.given.error is not None:
            return None
        if mark == CUT and self.sentence_end:
            text, mark = whole_sentences(text), ""
        if mark not in ("", RETRIED) and not self.marked:
            return None
        return " ".join(f"{self.prefix}{text}{self.suffix}".split())


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
            caption = style.caption(row)
            if caption is None:
                self.left_out["failed" if row.given.error is not None else row.given.mark] += 1
            else:
                yield row, caption


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

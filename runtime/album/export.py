"""A format's name -> the files that it makes of an album. Knows which format takes which arguments; no format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pocketllava.album.database import database_errors
from pocketllava.album.exports import sidecars, tables
from pocketllava.album.exports.captions import Report, Style
from pocketllava.album.exports.xmp import Naming, xmp
from pocketllava.album.journal import Album, Question, Row
from pocketllava.album.walk import Walk
from pocketllava.errors import InputError

BESIDE = ("txt", "caption", "xmp")  # a file beside each picture
FILES = {
    "metadata.jsonl": "metadata.jsonl", "metadata.csv": "metadata.csv", "jsonl": "captions.jsonl",
    "llava": "llava.json", "parquet": "captions.parquet", "webdataset": "webdataset",
}  # fmt: skip
FORMATS = (*BESIDE, *FILES)


@dataclass(frozen=True)
class Export:
    """What to write. target: the file or folder; None: its usual name in the pictures' folder."""

    format: str
    style: Style
    target: Path | None = None
    naming: Naming = "full"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"format: found {self.format!r}, expected one of {', '.join(FORMATS)}")
        if self.target is not None and self.format in BESIDE:
            raise InputError(
                f"out: found {self.target}, expected none: {self.format} lies beside each picture"
            )


def check(export: Export, walk: Walk) -> None:
    """Before a run starts: raise InputError for captions that would share a file."""
    stems = export.format == "xmp" and export.naming == "stem"
    if export.format in ("txt", "caption") or stems:
        sidecars.check_collisions(walk.folders())


def write(album: Album, question: Question, export: Export) -> Report:
    """Export a column of an album. Raises InputError; what was there before is there then, or is whole and new."""
    try:
        with database_errors(album.path):
            if export.format in BESIDE:
                sidecars.check_collisions(_folders(album, question, export))
            return _write(album.rows(question), export, Path(album.root))
    except OSError as error:
        name = error.filename or export.target or album.root
        raise InputError(f"{name}: cannot be written ({error.strerror or error})") from error


def beside(rows: Iterable[Row], export: Export) -> Report:
    """Write the files beside these pictures, while others are still asked about."""
    if export.format == "xmp":
        return xmp(rows, export.style, export.naming)
    return sidecars.write(rows, export.style, f".{export.format}")


def _write(rows: Iterable[Row], export: Export, root: Path) -> Report:
    if export.format in BESIDE:
        return beside(rows, export)
    target = export.target or root / FILES[export.format]
    if export.format == "parquet":
        from pocketllava.album.exports.parquet import parquet

        return parquet(rows, target, export.style)
    if export.format == "webdataset":
        from pocketllava.album.exports.webdataset import webdataset

        return webdataset(rows, target, export.style)
    tables_of = {
        "metadata.jsonl": tables.metadata_jsonl, "metadata.csv": tables.metadata_csv, "jsonl": tables.jsonl,
        "llava": tables.llava,
    }  # fmt: skip
    return tables_of[export.format](rows, target, export.style)


def _folders(album: Album, question: Question, export: Export) -> Iterable[tuple[str, Iterable[str]]]:
    """All pictures as those of one folder, by their paths below it."""
    if export.format != "xmp" or export.naming == "stem":
        yield album.root, (row.path for row in album.rows(question) if row.given.error is None)

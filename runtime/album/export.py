"""A format's name -> the files that it makes of an album. Knows which format takes which arguments; no format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pocketllava.album.database import database_errors
from pocketllava.album.exports import sidecars, tables
from pocketllava.album.exports.captions import Beside, Report, Style, check_target
from pocketllava.album.exports.sidecars import Sidecars
from pocketllava.album.exports.webdataset import check_folder, webdataset
from pocketllava.album.exports.xmp import Naming, XmpSidecars
from pocketllava.album.journal import Album, Question, Row
from pocketllava.album.walk import Walk
from pocketllava.album.words import SIDECARS
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

    @property
    def file_suffix(self) -> str:
        """What a sidecar's name ends in."""
        return f".{self.format}"

    def place(self, root: Path) -> Path:
        """The file or folder that is written, of pictures below root."""
        return self.target or root / FILES[self.format]

    def beside(self, *, waits: bool = False) -> Beside:
        """What writes the files beside pictures. Its tags are never those of the file that it writes.

        waits: while a model answers, from one to the next.
        """
        others = tuple(suffix for suffix in SIDECARS if suffix != self.file_suffix)
        style = replace(self.style, tag_files=others)
        if self.format == "xmp":
            return XmpSidecars(style, self.naming, waits=waits)
        return Sidecars(style, self.file_suffix)


def check(export: Export, walk: Walk) -> None:
    """Before a run starts: raise InputError for captions that would share a file, or one that is there already."""
    stems = export.format == "xmp" and export.naming == "stem"
    if export.format in ("txt", "caption") or stems:
        sidecars.check_collisions(walk.folders())
    elif export.format == "webdataset":
        check_folder(export.place(Path(walk.root)), export.style)
    elif export.format not in BESIDE:
        check_target(export.place(Path(walk.root)), export.style)


def check_album(album: Album, question: Question, export: Export) -> None:
    """The same of the pictures that an album has captions of, as far as they are there."""
    if export.format in BESIDE and (export.format != "xmp" or export.naming == "stem"):
        rows = (row for row in album.rows(question) if row.given.error is None)
        sidecars.check_collisions([(album.root, (row.path for row in rows if row.file.exists()))])


def write(album: Album, question: Question, export: Export) -> Report:
    """Export a column of an album. Raises InputError; what was there before is there then, or is whole and new."""
    try:
        with database_errors(album.path):
            check_album(album, question, export)
            return _write(album.rows(question), export, Path(album.root))
    except OSError as error:
        name = error.filename or export.target or album.root
        raise InputError(f"{name}: cannot be written ({error.strerror or error})") from error


def _write(rows: Iterable[Row], export: Export, root: Path) -> Report:
    if export.format in BESIDE:
        with export.beside() as writer:
            for row in rows:
                writer.add(row)
        return writer.report
    target = export.place(root)
    if export.format == "parquet":
        from pocketllava.album.exports.parquet import parquet

        return parquet(rows, target, export.style)
    if export.format == "webdataset":
        return webdataset(rows, target, export.style)
    tables_of = {
        "metadata.jsonl": tables.metadata_jsonl, "metadata.csv": tables.metadata_csv, "jsonl": tables.jsonl,
        "llava": tables.llava,
    }  # fmt: skip
    return tables_of[export.format](rows, target, export.style)

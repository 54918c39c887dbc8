"""XMP sidecars for photo managers: dc:description, and dc:subject from a record's list of words.

A new one is written here; one that exists belongs to somebody's photo manager, so only exiftool changes it, where
there is one, and else it is left alone.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from xml.etree import ElementTree as ET

from pocketllava.album.exports.captions import Beside, Style
from pocketllava.album.journal import Row
from pocketllava.errors import InputError
from pocketllava.models.files import atomic_write

Naming = Literal["full", "stem"]
NAMING = ("full", "stem")
LISTS = ("subject", "subjects", "keywords", "tags")  # of a record, whose words become dc:subject
META, RDF, DC = (
    "adobe:ns:meta/",
    "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "http://purl.org/dc/elements/1.1/",
)
LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
UPDATED = re.compile(r"^\s*(\d+) image files updated", re.MULTILINE)
TOGETHER = 64  # sidecars for each process of exiftool, whose start takes longer than a merge


class XmpSidecars(Beside):
    """naming: photo.jpg.xmp (digiKam, darktable, Immich) or photo.xmp (Lightroom, Capture One).

    waits: whether others come much later; each is merged at once then, not with others.
    """

    def __init__(self, style: Style, naming: Naming, *, waits: bool = False) -> None:
        super().__init__(style)
        self._naming, self._together, self._left_alone = naming, 1 if waits else TOGETHER, 0
        self._command = shutil.which("exiftool")
        self._merges: list[list[str]] = []

    def put(self, row: Row, caption: str) -> None:
        path = sidecar(row.file, self._naming)
        if not path.exists():
            _write(path, caption, subjects(row))
            self.report.written += 1
        elif self.style.existing == "skip":
            self.report.kept += 1
        elif self._command is None or not str(path.absolute()).isprintable():
            self._left_alone += 1
        else:
            self._merges.append(_merge(path, caption, subjects(row)))
            if len(self._merges) >= self._together:
                self._run_merges()

    def end(self) -> list[str]:
        self._run_merges()
        if not self._left_alone:
            return []
        why = (
            "only exiftool merges them, and it is not installed"
            if self._command is None
            else "exiftool refused them"
        )
        return [f"{self._left_alone} sidecars that exist were left alone: {why}"]

    def _run_merges(self) -> None:
        merges, self._merges = self._merges, []
        if merges and self._command is not None:
            merged = _merged(self._command, merges)
            self.report.written += merged
            self._left_alone += len(merges) - merged


def sidecar(picture: Path, naming: Naming) -> Path:
    """Where a picture's sidecar is."""
    return picture.with_name(picture.name + ".xmp") if naming == "full" else picture.with_suffix(".xmp")


def subjects(row: Row) -> list[str]:
    """Words of a structured answer's list."""
    if row.given.record is None:
        return []
    record = json.loads(row.given.record)
    lists = [record[name] for name in LISTS if name in record] if isinstance(record, dict) else []
    return [
        _text(word) for words in lists if isinstance(words, list) for word in words if isinstance(word, str)
    ]


def document(caption: str, words: Sequence[str]) -> bytes:
    """An XMP packet."""
    for prefix, uri in (("x", META), ("rdf", RDF), ("dc", DC)):
        ET.register_namespace(prefix, uri)
    root = ET.Element(f"{{{META}}}xmpmeta")
    about = ET.SubElement(
        ET.SubElement(root, f"{{{RDF}}}RDF"), f"{{{RDF}}}Description", {f"{{{RDF}}}about": ""}
    )
    alternatives = ET.SubElement(ET.SubElement(about, f"{{{DC}}}description"), f"{{{RDF}}}Alt")
    ET.SubElement(alternatives, f"{{{RDF}}}li", {LANGUAGE: "x-default"}).text = _text(caption)
    if words:
        bag = ET.SubElement(ET.SubElement(about, f"{{{DC}}}subject"), f"{{{RDF}}}Bag")
        for word in words:
            ET.SubElement(bag, f"{{{RDF}}}li").text = word
    packet: bytes = ET.tostring(root, "utf-8", xml_declaration=True)
    return packet


def _text(text: str) -> str:
    """Without what XML cannot hold."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _write(path: Path, caption: str, words: Sequence[str]) -> None:
    try:
        with atomic_write(path) as part:
            part.write_bytes(document(caption, words))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def _merge(path: Path, caption: str, words: Sequence[str]) -> list[str]:
    """exiftool's arguments that set the description and add the words; everything else in the file stays."""
    unique = [f"-XMP-dc:Subject-={word}" for word in words]  # exiftool: remove, then add
    added = [f"-XMP-dc:Subject+={word}" for word in words]
    return [
        *unique,
        f"-XMP-dc:Description={_text(caption)}",
        *added,
        "-overwrite_original",
        str(path.absolute()),
    ]


def _merged(command: str, merges: Sequence[Sequence[str]]) -> int:
    """How many of these one process of exiftool did. It ends by itself, whatever becomes of this one."""
    with TemporaryDirectory() as folder:
        listed = Path(folder, "arguments")
        listed.write_text("\n".join(line for merge in merges for line in (*merge, "-execute", "")), "utf-8")
        try:
            with subprocess.Popen(  # which an interrupt does not kill, amid a file
                [command, "-@", str(listed), "-common_args", "-charset", "filename=utf8"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
                errors="replace",
                start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            ) as process:  # fmt: skip
                said, _ = process.communicate()
        except OSError:
            return 0
    return sum(int(n) for n in UPDATED.findall(said))

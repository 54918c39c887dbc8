"""XMP sidecars for photo managers: dc:description, and dc:subject from a record's list of words.

A new one is written here; one that exists belongs to somebody's photo manager, so only exiftool changes it, where
there is one, and else it is left alone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
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
READY = "{ready}"


class XmpSidecars(Beside):
    """naming: photo.jpg.xmp (digiKam, darktable, Immich) or photo.xmp (Lightroom, Capture One).

    waits: whether others come much later; exiftool is ended meanwhile, which would outlive a process that is killed.
    """

    def __init__(self, style: Style, naming: Naming, *, waits: bool = False) -> None:
        super().__init__(style)
        self._naming, self._waits, self._tool, self._left_alone = naming, waits, _ExifTool(), 0

    def put(self, row: Row, caption: str) -> None:
        path = sidecar(row.file, self._naming)
        if not path.exists():
            _write(path, caption, subjects(row))
        elif self.style.existing == "skip":
            self.report.kept += 1
            return
        elif not self._tool.merge(path, caption, subjects(row)):
            self._left_alone += 1
            return
        elif self._waits:
            self._tool.close()
        self.report.written += 1

    def end(self) -> list[str]:
        self._tool.close()
        if not self._left_alone:
            return []
        why = (
            "exiftool refused them"
            if self._tool.found
            else "only exiftool merges them, and it is not installed"
        )
        return [f"{self._left_alone} sidecars that exist were left alone: {why}"]


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


class _ExifTool:
    """One process for all files (-stay_open), started when the first is merged."""

    def __init__(self) -> None:
        self._command = shutil.which("exiftool")
        self._process: subprocess.Popen[str] | None = None
        self.found = self._command is not None

    def merge(self, path: Path, caption: str, words: Sequence[str]) -> bool:
        """Whether the description and the words were set; everything else in the file stays."""
        name = str(path.absolute())
        if self._command is None or "\n" in name or "\r" in name or not name.isprintable():
            return False
        lines = [f"-XMP-dc:Description={_text(caption)}", *(f"-XMP-dc:Subject+={word}" for word in words)]
        unique = [f"-XMP-dc:Subject-={word}" for word in words]  # exiftool: remove, then add
        try:
            return "1 image files updated" in self._run([*unique, *lines, "-overwrite_original", name])
        except OSError:  # it was ended; the next one gets another
            self._process = None
            return False

    def _run(self, arguments: Sequence[str]) -> str:
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n".join((*arguments, "-execute", "")))
        process.stdin.flush()
        answer = ""
        for line in process.stdout:
            if line.strip() == READY:
                break
            answer += line
        return answer

    def _started(self) -> subprocess.Popen[str]:
        assert self._command is not None
        return subprocess.Popen(
            [self._command, "-stay_open", "True", "-@", "-", "-common_args", "-charset", "filename=utf8"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
            # Ctrl-C is for the run, which still writes its last caption
            start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )  # fmt: skip

    def close(self) -> None:
        """End it, where it was started."""
        process, self._process = self._process, None
        if process is not None:
            process.communicate("-stay_open\nFalse\n")

"""What of an unfinished conversion is whole, on disk: so that a killed one goes on from its last whole tensor.

A journal's first line names the conversion; each further line a file, its whole tensors, where they end and
the SHA-256 of everything up to there. Nothing in it is believed: what lies on the disk is hashed again, and
the last place up to which both agree is where the work goes on. Knows plans and files; no models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketllava.convert.plan.file_plan import FilePlan
from pocketllava.convert.write.pages import blocks, forget_all

JOURNAL = "journal"


@dataclass(frozen=True)
class Whole:
    """So many tensors of a file are whole; they end there; `digest` is a hash object of all up to there."""

    n_tensors: int
    end: int
    digest: Any


class Journal:
    """Lines appended as tensors become whole."""

    def __init__(self, folder: Path, identity: str) -> None:
        """The folder's journal if it is of this conversion, or an empty one; nothing is written yet."""
        self.path, self._identity = folder / JOURNAL, identity
        self._lines = _read(self.path, identity)

    def add(self, file: str, whole: Whole) -> None:
        """Record a whole tensor, whose bytes the system already has."""
        with self.path.open("a", encoding="utf-8") as out:
            out.write(_line(file, whole) + "\n")

    def begin(self, kept: dict[str, list[Whole]]) -> None:
        """Write the journal anew with what is kept of each file."""
        lines = [json.dumps(self._identity)]
        lines += [_line(file, whole) for file, wholes in kept.items() for whole in wholes]
        new = self.path.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n", "utf-8")
        new.replace(self.path)

    def whole(self, path: Path) -> list[Whole]:
        """Each place up to which a file is, on the disk, as the journal says, in order (reads that much of it)."""
        recorded = [line for line in self._lines[1:] if isinstance(line, list) and line[:1] == [path.name]]
        if not recorded or not path.is_file():
            return []
        found: list[Whole] = []
        digest, at = hashlib.sha256(), 0
        forget_all(path)
        with path.open("rb") as file:
            for line in recorded:
                if not _plausible(line, len(found), at):
                    break
                for block in blocks(file, line[2] - at):
                    digest.update(block)
                at = line[2]
                if digest.hexdigest() != line[3]:
                    break
                found.append(Whole(line[1], at, digest.copy()))
        return found


def _line(file: str, whole: Whole) -> str:
    return json.dumps([file, whole.n_tensors, whole.end, whole.digest.hexdigest()])


def _plausible(line: list[Any], n_tensors: int, at: int) -> bool:
    return len(line) == 4 and line[1] == n_tensors and isinstance(line[2], int) and line[2] > at


def _read(path: Path, identity: str) -> list[Any]:
    """The journal's lines up to the first that is torn; none if it is of another conversion."""
    lines: list[Any] = []
    try:
        for line in path.read_text("utf-8").split("\n")[:-1]:
            lines.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return lines if lines[:1] == [identity] else []


def identity(plans: Iterable[FilePlan]) -> str:
    """What must be equal for a conversion to go on: versions, both plans, the source files as they are.

    Plans hold every tensor's file, place, type and shape, which the sources' headers say.
    """
    digest = hashlib.sha256()
    for package in ("pocketllava", "llama-cpp-python", "gguf"):
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    sources: set[Path] = set()
    for plan in plans:
        _feed(digest, plan)
        sources |= {tensor.source.file for tensor in plan.tensors}
    for path in sorted(path for path in sources if path.is_file()):
        found = path.stat()
        digest.update(f"{path.resolve()} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Hash a plan's dataclasses, tuples, lists, arrays and plain values, whatever fields they have."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            digest.update(field.name.encode() + b"=")
            _feed(digest, getattr(value, field.name))
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, (tuple, list)):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(value).encode() + b";")

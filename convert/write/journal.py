"""Records which tensors of an interrupted conversion are complete on disk, so `--resume` can continue after the last.

A journal's first line identifies the conversion; each further line names a file, its complete tensors, the byte at
which they end, and the SHA-256 up to there. None of it is trusted: the file on disk is hashed again, and work
continues from the last line that agrees. Knows plans and files; no models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketllava.convert.plan.file_plan import FilePlan
from pocketllava.convert.read.source_reader import forget
from pocketllava.models.files import move

JOURNAL = "journal"
BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Completed:
    """The first n_tensors of a file are complete and end at byte `end`; `digest` is the hash object up to there."""

    n_tensors: int
    end: int
    digest: Any


class Journal:
    """Lines appended as tensors are completed."""

    def __init__(self, folder: Path, identity: str) -> None:
        """The folder's journal if it is of this conversion, or an empty one; nothing is written yet."""
        self.path, self._identity = folder / JOURNAL, identity
        self._lines = _read(self.path, identity)

    def add(self, file: str, completed: Completed) -> None:
        """Record a complete tensor, whose bytes the system already has."""
        with self.path.open("a", encoding="utf-8") as out:
            out.write(_line(file, completed) + "\n")

    def begin(self, files: dict[str, list[Completed]]) -> None:
        """Write the journal anew with the lines from which the conversion continues."""
        lines = [json.dumps(self._identity)]
        lines += [_line(file, completed) for file, steps in files.items() for completed in steps]
        new = self.path.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n", "utf-8")
        move(new, self.path)

    def confirmed(self, path: Path) -> list[Completed]:
        """The recorded steps of a file that agree with what the disk holds, in order (reads that much of it)."""
        recorded = [line for line in self._lines[1:] if isinstance(line, list) and line[:1] == [path.name]]
        if not recorded or not path.is_file():
            return []
        steps: list[Completed] = []
        digest, end = hashlib.sha256(), 0
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            forget(file)  # what is hashed comes from the disk
            for line in recorded:
                if not _is_plausible(line, len(steps), end):
                    break
                _hash(file, line[2] - end, digest)
                end = line[2]
                if digest.hexdigest() != line[3]:
                    break
                steps.append(Completed(line[1], end, digest.copy()))
        return steps


def has_tensors(folder: Path) -> bool:
    """Whether a stopped conversion left a complete tensor there; whether it can be used is for `confirmed`."""
    lines = [_parsed(line) for line in _text(folder / JOURNAL).split("\n")]
    return any(isinstance(line, list) and len(line) > 1 and line[1] not in (0, None) for line in lines)


def _hash(file: Any, n_bytes: int, digest: Any) -> None:
    """Feed the next n_bytes of a file to a hash; fewer if it ends."""
    while n_bytes and (block := file.read(min(n_bytes, BLOCK_BYTES))):
        digest.update(block)
        n_bytes -= len(block)


def _line(file: str, completed: Completed) -> str:
    return json.dumps([file, completed.n_tensors, completed.end, completed.digest.hexdigest()])


def _is_plausible(line: list[Any], n_tensors: int, end: int) -> bool:
    return len(line) == 4 and line[1] == n_tensors and isinstance(line[2], int) and line[2] > end


def _read(path: Path, identity: str) -> list[Any]:
    """The journal's lines up to the first that is torn; none if it is of another conversion."""
    lines = [_parsed(line) for line in _text(path).split("\n")[:-1]]
    whole = lines[: lines.index(None)] if None in lines else lines
    return whole if whole[:1] == [identity] else []


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError):
        return ""


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def identity(plans: Iterable[FilePlan]) -> str:
    """A hash of all that must be equal to continue: versions, both plans, sizes and times of the source files.

    Plans hold every tensor's file, offset, type and shape, which the sources' headers give.
    """
    digest = hashlib.sha256()
    for package in ("pocketllava", "llama-cpp-python", "gguf"):
        digest.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    sources: set[Path] = set()
    for plan in plans:
        _feed(digest, plan)
        sources |= {tensor.source.file for tensor in plan.tensors}
    for path in sorted(path for path in sources if path.is_file()):
        status = path.stat()
        about = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n"
        digest.update(about.encode("utf-8", "surrogateescape"))
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

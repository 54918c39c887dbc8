"""Tar shards as img2dataset lays them out: 00000.tar with 000000000.jpg, .txt and .json, and 00000.parquet."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pocketllava.album.exports import parquet
from pocketllava.album.exports.captions import Report, Style
from pocketllava.album.exports.tables import values
from pocketllava.album.journal import Row
from pocketllava.errors import InputError
from pocketllava.models.files import atomic_write, read_regular
from pocketllava.types import MAX_FILE_BYTES

SHARD = 10_000  # samples
EXTENSIONS = {".jpeg": "jpg", ".jpe": "jpg", ".jfif": "jpg", ".tiff": "tif"}
_NAME = re.compile(r"(\d{5,})\.(tar|parquet)")


def check_folder(folder: Path, style: Style) -> None:
    """Raise InputError for a file, and for a folder that has shards already, unless they are to be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: found a file, expected a folder; give --out another name")
    if folder.exists() and style.existing != "overwrite" and any(folder.glob("*.tar")):
        raise InputError(f"{folder}: exists; give --out a new folder, or --existing overwrite")


def webdataset(rows: Iterable[Row], folder: Path, style: Style) -> Report:
    """Shards in a folder, each whole or not there; a picture that is gone meanwhile is left out."""
    check_folder(folder, style)
    folder.mkdir(parents=True, exist_ok=True)
    report, n_shards = Report(), 0
    chosen = report.chosen(rows, style)
    while (first := next(chosen, None)) is not None:
        some = islice(chain([first], chosen), SHARD)
        entries: list[dict[str, Any]] = []
        with atomic_write(folder / f"{n_shards:05d}.tar") as part, tarfile.open(part, "w") as tar:
            for entry, sample in _samples(some, report, n_shards * SHARD):
                for name, data in sample:
                    _add(tar, name, data)
                entries.append(entry)
        report.written += len(entries)
        if parquet.installed():
            parquet.entries(folder / f"{n_shards:05d}.parquet", entries)
        n_shards += 1
    if older := _older(folder, n_shards):
        report.remarks.append(f"{', '.join(older)}: of an earlier export, remove them")
    return report


def _older(folder: Path, n_shards: int) -> list[str]:
    """Files of shards that a larger export left."""
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if (match := _NAME.fullmatch(name)) and int(match[1]) >= n_shards]


def _samples(
    rows: Iterable[tuple[Row, str]], report: Report, start: int
) -> Iterator[tuple[dict[str, Any], list[tuple[str, bytes]]]]:
    """Each picture's fields, and its files."""
    for n, (row, caption) in enumerate(rows, start):
        try:
            picture = read_regular(row.file, MAX_FILE_BYTES)
        except (OSError, ValueError):
            report.left_out["gone"] += 1
            continue
        extension, key = row.file.suffix.lower(), f"{n:09d}"
        entry = {"key": key, **values(row, caption)}
        yield (
            entry,
            [
                (f"{key}.{EXTENSIONS.get(extension, extension[1:])}", picture),
                (f"{key}.txt", caption.encode()),
                (f"{key}.json", json.dumps(entry, ensure_ascii=False).encode()),
            ],
        )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))

"""Tar shards as webdataset and img2dataset lay them out: 00000.tar with 000000000.jpg, .txt and .json."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from pocketllava.album.exports.captions import Report, Style
from pocketllava.album.exports.tables import values
from pocketllava.album.journal import Row
from pocketllava.errors import InputError
from pocketllava.models.files import atomic_write, read_regular
from pocketllava.types import MAX_FILE_BYTES

SHARD = 10_000  # samples
EXTENSIONS = {".jpeg": "jpg", ".jpe": "jpg", ".jfif": "jpg", ".tiff": "tif"}


def webdataset(rows: Iterable[Row], folder: Path, style: Style) -> Report:
    """Shards in a folder, each whole or not there; a picture that is gone meanwhile is left out."""
    if (
        folder.exists()
        and (not folder.is_dir() or any(folder.glob("*.tar")))
        and style.existing != "overwrite"
    ):
        raise InputError(f"{folder}: exists; give --out a new folder, or --existing overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    report, n_shards = Report(), 0
    chosen = report.chosen(rows, style)
    while (first := next(chosen, None)) is not None:
        some = islice(chain([first], chosen), SHARD)
        with atomic_write(folder / f"{n_shards:05d}.tar") as part, tarfile.open(part, "w") as tar:
            for sample in _samples(some, report, n_shards * SHARD):
                for name, data in sample:
                    _add(tar, name, data)
                report.written += 1
        n_shards += 1
    return report


def _samples(
    rows: Iterable[tuple[Row, str]], report: Report, start: int
) -> Iterator[list[tuple[str, bytes]]]:
    for n, (row, caption) in enumerate(rows, start):
        try:
            picture = read_regular(row.file, MAX_FILE_BYTES)
        except (OSError, ValueError):
            report.left_out["gone"] += 1
            continue
        extension = row.file.suffix.lower()
        key = f"{n:09d}"
        yield [
            (f"{key}.{EXTENSIONS.get(extension, extension[1:])}", picture),
            (f"{key}.txt", caption.encode()),
            (f"{key}.json", json.dumps(values(row, caption), ensure_ascii=False).encode()),
        ]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))

"""One line a picture: metadata.jsonl and .csv as `datasets` reads them, all fields as JSON, LLaVA's training list."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pocketllava.album.exports.captions import Report, Style, check_target, relative_to
from pocketllava.album.journal import Row
from pocketllava.models.files import atomic_write, utf8

Write = Callable[[TextIO, Iterator[tuple[Row, str]], Path], Iterator[None]]


def values(row: Row, caption: str) -> dict[str, Any]:
    """Every field of an answer, under the names that parquet has too."""
    given, question = row.given, row.question
    return {
        "path": utf8(row.path), "sha256": row.sha256, "caption": caption, "json": given.record,
        "tokens": given.tokens, "finish_reason": given.finish_reason, "mark": given.mark, "model": question.model,
        "prompt": given.asked or question.prompt, "prompt_sha": question.identity, "seconds": given.seconds,
        "error": given.error,
    }  # fmt: skip


def metadata_jsonl(rows: Iterable[Row], target: Path, style: Style) -> Report:
    """{"file_name", "text"}: `load_dataset("imagefolder", data_dir=...)`."""

    def write(file: TextIO, chosen: Iterator[tuple[Row, str]], folder: Path) -> Iterator[None]:
        for row, caption in chosen:
            entry = {"file_name": relative_to(row, folder), "text": caption}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            yield

    return _written(rows, target, style, write)


def metadata_csv(rows: Iterable[Row], target: Path, style: Style) -> Report:
    """The same as a table."""

    def write(file: TextIO, chosen: Iterator[tuple[Row, str]], folder: Path) -> Iterator[None]:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file_name", "text"))
        for row, caption in chosen:
            table.writerow((relative_to(row, folder), caption))
            yield

    return _written(rows, target, style, write)


def jsonl(rows: Iterable[Row], target: Path, style: Style) -> Report:
    """Every field, one object a line."""

    def write(file: TextIO, chosen: Iterator[tuple[Row, str]], _folder: Path) -> Iterator[None]:
        for row, caption in chosen:
            file.write(json.dumps(values(row, caption), ensure_ascii=False) + "\n")
            yield

    return _written(rows, target, style, write)


def llava(rows: Iterable[Row], target: Path, style: Style) -> Report:
    """LLaVA's list of conversations, images relative to the file."""

    def write(file: TextIO, chosen: Iterator[tuple[Row, str]], folder: Path) -> Iterator[None]:
        file.write("[")
        for n, (row, caption) in enumerate(chosen):
            human = {"from": "human", "value": f"<image>\n{row.given.asked or row.question.prompt}"}
            entry = {
                "id": row.sha256[:16], "image": relative_to(row, folder),
                "conversations": [human, {"from": "gpt", "value": caption}],
            }  # fmt: skip
            file.write(("," if n else "") + "\n" + json.dumps(entry, ensure_ascii=False))
            yield
        file.write("\n]\n")

    return _written(rows, target, style, write)


def _written(rows: Iterable[Row], target: Path, style: Style, write: Write) -> Report:
    check_target(target, style)
    report = Report()
    with atomic_write(target) as part, part.open("w", encoding="utf-8", errors="replace", newline="") as file:
        for _ in write(file, report.chosen(rows, style), target.parent):
            report.written += 1
    return report

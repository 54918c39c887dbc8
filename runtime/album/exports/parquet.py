"""All fields as a parquet file, in groups of rows. The one file that knows pyarrow (extra `parquet`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from pocketllava.album.exports.captions import Report, Style, check_target
from pocketllava.album.exports.tables import values
from pocketllava.album.journal import Row
from pocketllava.errors import UnsupportedOption
from pocketllava.models.files import atomic_write

GROUP = 10_000  # rows
FIELDS = ("path", "sha256", "caption", "json", "tokens", "finish_reason", "mark", "model", "prompt", "prompt_sha",
          "seconds", "error")  # fmt: skip
Groups = Iterable[Sequence[Mapping[str, Any]]]


def installed() -> bool:
    """Whether pyarrow is there."""
    return find_spec("pyarrow") is not None


def parquet(rows: Iterable[Row], target: Path, style: Style) -> Report:
    """Raises UnsupportedOption without pyarrow."""
    if not installed():
        raise UnsupportedOption(
            'parquet: it needs pyarrow; install it with pip install "pocketllava[parquet]"'
        )
    check_target(target, style)
    report = Report()
    chosen = report.chosen(rows, style)

    def groups() -> Iterator[Sequence[Mapping[str, Any]]]:
        while group := [values(row, caption) for row, caption in islice(chosen, GROUP)]:
            yield group
            report.written += len(group)

    _write(target, FIELDS, groups())
    return report


def entries(target: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The fields of one shard's samples, and their keys."""
    _write(target, ("key", *FIELDS), [rows])


def _write(target: Path, names: Sequence[str], groups: Groups) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    kinds = {"tokens": pa.int32(), "seconds": pa.float32()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    with atomic_write(target) as part, ParquetWriter(part, schema) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(list(group), schema))

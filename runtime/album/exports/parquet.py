"""All fields as a parquet file, in groups of rows. The one file that knows pyarrow (extra `parquet`)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from pocketllava.album.exports.captions import Report, Style, check_target
from pocketllava.album.exports.tables import values
from pocketllava.album.journal import Row
from pocketllava.errors import UnsupportedOption
from pocketllava.models.files import atomic_write

GROUP = 10_000  # rows


def parquet(rows: Iterable[Row], target: Path, style: Style) -> Report:
    """Raises UnsupportedOption without pyarrow."""
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetWriter
    except ImportError as error:
        raise UnsupportedOption(
            'parquet: it needs pyarrow; install it with pip install "pocketllava[parquet]"'
        ) from error
    check_target(target, style)
    kinds = {"tokens": pa.int32(), "seconds": pa.float32()}
    names = ("path", "sha256", "caption", "json", "tokens", "finish_reason", "mark", "model", "prompt", "prompt_sha",
             "seconds", "error")  # fmt: skip
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    report = Report()
    chosen = report.chosen(rows, style)
    with atomic_write(target) as part, ParquetWriter(part, schema) as writer:
        while group := [values(row, caption) for row, caption in islice(chosen, GROUP)]:
            writer.write_table(pa.Table.from_pylist(group, schema))
            report.written += len(group)
    return report

"""What `caption` and `album export` share: a format, its options, and what was written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import Command, Place, Text, refuse
from pocketllava.models.files import expanded

if TYPE_CHECKING:
    from pocketllava.album.export import Export
    from pocketllava.album.exports.captions import Report

ALBUM_SUFFIX = ".album"
EXISTING = ("skip", "overwrite", "append", "prepend")
FORMATS = (
    "txt",
    "caption",
    "xmp",
    "metadata.jsonl",
    "metadata.csv",
    "jsonl",
    "llava",
    "parquet",
    "webdataset",
)
NAMES = ("out", "existing", "prefix", "suffix", "sentence_end", "marked", "xmp_name")


def export_options(command: Command) -> Command:
    """--to FORMAT and what goes with it, handed to the command as `export`, an Export or None."""

    @functools.wraps(command)
    def with_export(*args: Any, to: str | None, **rest: Any) -> Any:
        values = {name: rest.pop(name) for name in NAMES}
        if to is None:
            refuse("without --to FORMAT", *NAMES)
        return command(*args, export=None if to is None else _export(to, **values), **rest)

    decorated: Any = with_export
    for option in reversed(_options()):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def show_report(report: Report, export: Export) -> None:
    """A line on stderr; remarks below it."""
    parts = [f"{report.written:,} written"]
    parts += (
        [f"{report.kept:,} left as they were (--existing overwrite|append|prepend)"] if report.kept else []
    )
    left_out = ", ".join(f"{n:,} {reason}" for reason, n in sorted(report.left_out.items()))
    parts += [f"left out: {left_out}"] if left_out else []
    click.echo(f"{export.format}: {'; '.join(parts)}", err=True)
    for remark in report.remarks:
        click.echo(f"{export.format}: {remark}", err=True)


def _export(
    to: str,
    out: str | None,
    existing: Any,
    prefix: str,
    suffix: str,
    sentence_end: bool,
    marked: bool,
    xmp_name: Any,
) -> Export:
    from pocketllava.album.export import Export
    from pocketllava.album.exports.captions import Style

    style = Style(prefix, suffix, sentence_end, marked, existing)
    return Export(to, style, expanded(out) if out is not None else None, xmp_name)


def _options() -> list[Callable[[Any], Any]]:
    return [
        click.option("--to", metavar="FORMAT", type=click.Choice(FORMATS),
                     help=f"Write captions as {', '.join(FORMATS[:-1])} or {FORMATS[-1]}."),
        click.option("--out", metavar="PATH", type=Place(),
                     help="The file or folder to write.  [default: in the pictures' folder]"),
        click.option("--existing", type=click.Choice(EXISTING), default=EXISTING[0],
                     help="What to do with files that are there.  [default: skip]"),
        click.option("--prefix", metavar="TEXT", type=Text(), default="",
                     help="Before each caption: a trigger word; {name}, {directory}, {tags}: the picture's."),
        click.option("--suffix", metavar="TEXT", type=Text(), default="", help="Behind each caption; the same words."),
        click.option("--sentence-end", is_flag=True, help="End captions that were cut at their last full stop."),
        click.option("--marked", is_flag=True, help="Captions that are cut, loops or refusals as well."),
        click.option("--xmp-name", type=click.Choice(("full", "stem")), default="full",
                     help="photo.jpg.xmp (digiKam, darktable, Immich) or photo.xmp (Lightroom).  [default: full]"),
    ]  # fmt: skip

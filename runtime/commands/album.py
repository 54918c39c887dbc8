"""`pocketllava album`: merge albums, export them, say what is in one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from pocketllava.commands.common import Place
from pocketllava.commands.exporting import export_options, show_report
from pocketllava.models.files import expanded

if TYPE_CHECKING:
    from pocketllava.album.export import Export


@click.group()
def album() -> None:
    """What captions are kept in: merge albums, export them, look into one."""


@album.command()
@click.argument("album_path", metavar="ALBUM", type=Place())
@click.argument("others", metavar="OTHER...", nargs=-1, required=True, type=Place())
def merge(album_path: str, others: tuple[str, ...]) -> None:
    """Put what other albums know into ALBUM, which is made if there is none.

    An answer takes the place of an error; nothing else is replaced.

    \b
    pocketllava album merge all.album part1.album part2.album
    """
    from pocketllava.album.journal import Album
    from pocketllava.album.merge import merge as merged

    paths = [expanded(other) for other in others]
    for path in paths:  # before anything is changed
        Album(path).close()
    with Album(paths[0]) as first:
        root = first.root
    with Album(expanded(album_path), root=root) as into:
        for path in paths:
            done = merged(into, path)
            click.echo(f"{path}: {done.added:,} answers added, {done.known:,} known", err=True)


@album.command()
@click.argument("album_path", metavar="ALBUM", type=Place())
@click.option("--column", metavar="NAME", help="Which question's answers, by its text or number.")
@export_options
def export(album_path: str, column: str | None, export: Export | None) -> None:
    """Write an album's captions in other programs' formats. Pictures are never written to.

    \b
    pocketllava album export photos.album --to txt --prefix "ohwx, "
    pocketllava album export photos.album --to parquet --out captions.parquet
    """
    from pocketllava.album.export import write
    from pocketllava.album.journal import Album

    if export is None:
        raise click.UsageError("Missing option '--to'.")
    with Album(expanded(album_path)) as opened:
        show_report(write(opened, opened.question(column), export), export)


@album.command("list")
@click.argument("album_path", metavar="ALBUM", type=Place())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a column.")
def list_columns(album_path: str, as_json: bool) -> None:
    """The questions of an album, and how many pictures are answered."""
    from pocketllava.album.journal import Album

    with Album(expanded(album_path)) as opened:
        for question in opened.questions():
            done, failed = opened.count(question), opened.count(question, failed=True)
            fields = {"id": question.id, "prompt": question.prompt, "model": question.model,
                      "options": question.options, "answers": done, "failed": failed}  # fmt: skip
            line = (
                f"{question.id}  {question.prompt!r}  {question.model}  {done:,} answers, {failed:,} failed"
            )
            click.echo(json.dumps(fields, ensure_ascii=False) if as_json else line)

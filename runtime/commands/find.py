"""`pocketllava find`: pictures of an album by words, or by likeness."""

from __future__ import annotations

import html
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pocketllava.commands.common import INERT, Place, text_argument
from pocketllava.errors import InputError
from pocketllava.models.files import expanded, utf8

if TYPE_CHECKING:
    from pocketllava.album.alike import Vector
    from pocketllava.album.journal import Album, Row

    Hit = tuple[Row, float | None]

NOT_FOUND = 1


@click.command()
@click.argument("album_path", metavar="ALBUM", type=Place())
@click.argument("words", metavar="WORDS...", nargs=-1)
@click.option("--like", "picture", metavar="PICTURE", type=Place(), help="Pictures that look like this one.")
@click.option(
    "--model", metavar="BUNDLE", type=Place(), help="For --like with a picture that is not in the album."
)
@click.option("--column", metavar="NAME", help="Answers to this question only, by its text or number.")
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(1, 100_000),
    default=20,
    help="At most so many.  [default: 20]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a picture.")
@click.option("--open", "open_page", is_flag=True, help="Show them on a page in the browser.")
def find(
    album_path: str,
    words: tuple[str, ...],
    picture: str | None,
    model: str | None,
    column: str | None,
    limit: int,
    as_json: bool,
    open_page: bool,
) -> int:
    """Find pictures of an album by what was answered about them, the best first.

    All words must be there, in any order. "Several words" in quotes stand together, word* begins a word, and AND, OR,
    NOT and brackets do what they say. Case and accents do not count.

    \b
    pocketllava find photos.album red square
    pocketllava find photos.album '"at the left" OR "top left"'
    pocketllava find photos.album --like photo.jpg --open
    """
    from pocketllava.album.journal import Album
    from pocketllava.album.search import found

    if bool(words) == (picture is not None):
        raise click.UsageError("expected WORDS, or --like PICTURE")
    with Album(expanded(album_path)) as album:
        if picture is not None:
            hits: list[Hit] = _alike(album, expanded(picture), model, limit)
        else:
            question = album.question(column) if column else None
            text = " ".join(map(text_argument, words))
            rows = found(album, text, question=question, limit=limit)
            first = {row.path: row for row in reversed(list(rows))}
            hits = [(row, None) for row in reversed(first.values())]
    _show(hits, as_json)
    if open_page and hits:
        click.launch(_page(hits).as_uri())
    if not hits:
        click.echo("nothing found", err=True)
    return 0 if hits else NOT_FOUND


def _alike(album: Album, picture: Path, model: str | None, limit: int) -> list[Hit]:
    from pocketllava.album.search import alike_rows

    tower, wanted = _features(album, picture, model)
    return [(row, cosine) for row, cosine in alike_rows(album, tower, wanted, limit)]


def _features(album: Album, picture: Path, model: str | None) -> tuple[str, Vector]:
    """The picture's features: the album's, or those that a model computes now."""
    import hashlib

    from pocketllava.album.search import features_of
    from pocketllava.models.files import read_regular
    from pocketllava.types import MAX_FILE_BYTES

    try:
        data = read_regular(picture, MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{picture}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    if known := features_of(album, hashlib.sha256(data).hexdigest()):
        return known
    if model is None:
        raise InputError(
            f"{picture}: not in the album; --model BUNDLE looks at it, the one that the album was made with"
        )
    return _computed(data, model, [question.model_sha256 for question in album.questions()])


def _computed(data: bytes, model: str, towers: list[str]) -> tuple[str, Vector]:
    from pocketllava import Llava, Options
    from pocketllava.album import alike
    from pocketllava.album.prompts import questions
    from pocketllava.names import open_bundle

    (question,) = questions(open_bundle(model), [""], Options(), {})
    if question.model_sha256 not in towers:
        raise InputError(
            f"{model}: not the model that the album was made with, whose features cannot be compared"
        )
    with Llava.load(model) as llava:
        return question.model_sha256, alike.unit(llava.image_features(data).mean(axis=0))


def _show(hits: Iterable[Hit], as_json: bool) -> None:
    for row, cosine in hits:
        if as_json:
            fields = {
                "path": utf8(str(row.file)), "caption": row.given.text, "question": row.question.prompt,
                "model": row.question.model, "mark": row.given.mark or None, "likeness": cosine,
            }  # fmt: skip
            click.echo(json.dumps(fields, ensure_ascii=False))
        else:
            likeness = f"{cosine:.3f}  " if cosine is not None else ""
            click.echo(
                f"{likeness}{utf8(str(row.file))}\t{row.given.text or ''}".translate(INERT).replace("\n", " ")
            )


def _page(hits: Iterable[Hit]) -> Path:
    """A page of thumbnails in the temporary folder; the browser scales the pictures themselves."""
    figures = "\n".join(
        f'<figure><a href="{_uri(row)}"><img src="{_uri(row)}" loading="lazy" alt=""></a>'
        f"<figcaption>{html.escape(row.given.text or '')}</figcaption></figure>"
        for row, _ in hits
    )
    style = "body{display:flex;flex-wrap:wrap;gap:1em;font:14px sans-serif}figure{width:220px;margin:0}img{width:100%}"
    page = f'<!doctype html><meta charset="utf-8"><title>pictures</title><style>{style}</style>\n{figures}\n'
    handle, name = tempfile.mkstemp(".html", "pocketllava-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(page)
    return Path(name)


def _uri(row: Row) -> str:
    return html.escape(row.file.absolute().as_uri())

"""`pocketllava import`: LLaVA files that other programs keep, listed, or taken into the store where they lie."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import Place, Text, pair_options
from pocketllava.models.plan_text import size

if TYPE_CHECKING:
    from pocketllava.convert.adopt import Row


@click.command("import")
@click.argument("source", metavar="[PATH | ollama:NAME]", required=False, type=Place())
@click.option("--scan", "scanning", is_flag=True, help="List what Ollama, LM Studio and others have.")
@click.option("--as", "name", metavar="NAME", type=Text("a name"), help="Its name in the store.")
@click.option("--copy", "files", flag_value="copy", help="Copy the files instead of referring to them.")
@click.option("--link", "files", flag_value="link", help="Hard links, where the disk and the owner allow it.")
@pair_options
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def import_model(
    source: str | None,
    scanning: bool,
    name: str | None,
    files: str | None,
    dry_run: bool,
    as_json: bool,
    pair: dict[str, Any],
) -> None:
    """Take a LLaVA that is on this disk already into the store, without copying it.

    PATH is a GGUF text model with its mmproj beside it, their folder, or a llamafile; ollama:NAME is a model of
    Ollama's. --scan lists what lies in the folders of Ollama, LM Studio, llama.cpp, the Hugging Face cache, Jan and
    GPT4All.

    \b
    pocketllava import --scan
    pocketllava import ollama:llava:7b --as llava
    pocketllava import ~/models/llava-v1.5-7b-Q4_K.gguf
    """
    if scanning == (source is not None):
        raise click.UsageError("found neither PATH nor --scan" if not scanning else "--scan takes no PATH")
    if scanning:
        _list(as_json)
    elif source is not None:
        _take(source, name, files, pair, dry_run=dry_run, as_json=as_json)


def _take(
    source: str, name: str | None, files: str | None, options: dict[str, Any], *, dry_run: bool, as_json: bool
) -> None:
    from pocketllava.convert.adopt import adopt, default_name, found, known_roots, usual_files
    from pocketllava.convert.foreign import said
    from pocketllava.convert.pair import style
    from pocketllava.models.store import parsed

    pair = found(source, options["mmproj"], known_roots())
    how_kept = files or usual_files(pair)
    how = style(pair.text, pair.projector.info, options["template"], options["pad"], likely=pair.template)
    full = parsed(name) if name is not None else default_name(pair)
    click.echo(said(pair, how), err=True)
    if not dry_run:
        adopt(pair, how, full, files=how_kept)
    about = {
        "name": full,
        "model": str(pair.text.path),
        "mmproj": str(pair.projector.path),
        "owner": pair.owner,
        "faults": pair.projector.faults,
        "files": how_kept,
        "template": how.name,
        "pad": how.pad,
        "imported": not dry_run,
    }
    click.echo(json.dumps(about, indent=2) if as_json else full)


def _list(as_json: bool) -> None:
    from pocketllava.convert.adopt import known_roots, scan

    rows = list(scan(known_roots()))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    widths = [max((len(getattr(row, key)) for row in rows), default=0) for key in ("name", "kind", "types")]
    for row in rows:
        cells = zip((row.name, row.kind, row.types), widths, strict=True)
        click.echo("  ".join([*(f"{cell:<{width}}" for cell, width in cells), _state(row)]))
    usable = [row for row in rows if row.problem is None]
    total = size(sum({row.model: row.bytes for row in usable}.values()))
    click.echo(
        f"{len(usable)} of {len(rows)} can be imported; {total} need not lie here twice"
        if rows
        else "found no LLaVA in the folders of Ollama, LM Studio, llama.cpp, Hugging Face, Jan and GPT4All",
        err=True,
    )


def _state(row: Row) -> str:
    if row.problem is not None:
        return f"{row.app}: {row.problem}"
    faults = f", projector with {len(row.faults)} faults: {'; '.join(row.faults)}" if row.faults else ""
    return f"{row.app}, {size(row.bytes)}{faults}"

"""`pocketllava list`: the models in the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pocketllava.models.plan_text import size
from pocketllava.models.store import DOWNLOADS, Store


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_models(as_json: bool) -> None:
    """List the models in the store, with their types, sizes and where they are from."""
    store = Store.default()
    rows = [row(store, name) for name in store.names()]
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    if not rows:
        click.echo(f"{store.root}: no models; `pocketllava pull owner/name` adds one", err=True)
    widths = [max((len(str(row[key])) for row in rows), default=0) for key in ("name", "types", "size")]
    for row_ in rows:
        cells = zip((row_["name"], row_["types"], row_["size"]), widths, strict=True)
        click.echo(
            "  ".join([*(f"{cell:<{width}}" for cell, width in cells), f"{row_['source']}{elsewhere(row_)}"])
        )
    unfinished(store)


def row(store: Store, name: str) -> dict[str, Any]:
    """What is listed of a model. One that cannot be read says so in the place of its source."""
    from pocketllava.errors import PocketLlavaError
    from pocketllava.models.manifest import MANIFEST, Manifest

    folder = store.folder(name)
    about: dict[str, Any] = {"name": name, "folder": str(folder), "types": "?", "bytes": 0, "size": "?"}
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except PocketLlavaError as error:
        return {**about, "source": f"damaged: {error}", "revision": None, "references": []}
    n_bytes = sum(record.bytes for record in manifest.files.values())
    references = [
        {"file": name, **reference.to_json(), "there": Path(reference.path).is_file()}
        for name, reference in manifest.references.items()
    ]
    return {
        **about,
        "types": f"{manifest.types.model} + {manifest.types.mmproj}",
        "bytes": n_bytes,
        "size": size(n_bytes),
        "source": manifest.source.id,
        "revision": manifest.source.revision,
        "references": references,
    }


def elsewhere(row: dict[str, Any]) -> str:
    """Whose files a model only refers to, and whether one is gone."""
    references = row["references"]
    if not references:
        return ""
    owners = sorted({reference["owner"] or str(Path(reference["path"]).parent) for reference in references})
    gone = [reference["path"] for reference in references if not reference["there"]]
    missing = f"; missing: {', '.join(gone)}" if gone else ""
    return f"  (refers to files of {' and '.join(owners)}{missing})"


def unfinished(store: Store) -> None:
    """Say what stopped pulls left."""
    n_bytes = sum(path.stat().st_size for path in (store.root / DOWNLOADS).glob("sha*"))
    if n_bytes:
        click.echo(
            f"{size(n_bytes)} of stopped downloads; the same `pull` goes on with them, `rm --unfinished` removes them",
            err=True,
        )

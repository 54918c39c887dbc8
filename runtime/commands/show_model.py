"""`pocketllava show`: what the store knows of a model."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from pocketllava.commands.completion import Model
from pocketllava.models.plan_text import size
from pocketllava.models.store import Store


@click.command("show")
@click.argument("name", type=Model(folders=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(name: str, as_json: bool) -> None:
    """Show where a model of the store is from, its files with their hashes, and its sizes."""
    from pocketllava.models import Bundle

    store = Store.default()
    full = store.find(name)
    bundle = Bundle.open(store.folder(full))
    manifest, text = bundle.manifest, bundle.text_info
    about: dict[str, Any] = {
        "name": full,
        "source": f"{manifest.source.id}{f'@{manifest.source.revision}' if manifest.source.revision else ''}",
        "types": f"{manifest.types.model} + {manifest.types.mmproj}",
        "image tokens": bundle.image_tokens,
        "context": text.n_ctx_train,
        "made with": f"pocketllava {manifest.version}",
        "files": {str(bundle.path_of(key)): asdict(record) for key, record in manifest.files.items()},
    }
    owners = {str(bundle.path_of(key)): reference.owner for key, reference in manifest.references.items()}
    if as_json:
        click.echo(json.dumps(about, ensure_ascii=False, indent=2))
        return
    files = about.pop("files")
    for key, value in about.items():
        click.echo(f"{key + ':':<14}{value}")
    for path, record in files.items():
        owner = f"  (refers to {owners[path]}'s)" if owners.get(path) else ""
        click.echo(f"{path}  {size(record['bytes'])}  sha256:{record['sha256'] or 'not known'}{owner}")

"""`pocketllava rm`: removes a model from the store, or what stopped downloads left."""

from __future__ import annotations

import sys

import click

from pocketllava.commands.completion import Model
from pocketllava.commands.list import row
from pocketllava.errors import InputError
from pocketllava.models.store import Store


@click.command()
@click.argument("name", required=False, type=Model(folders=False))
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--unfinished", is_flag=True, help="Instead of a model: what stopped downloads left.")
def rm(name: str | None, yes: bool, unfinished: bool) -> None:
    """Remove a model from the store. One that is loaded somewhere is refused."""
    store = Store.default()
    if unfinished == (name is not None):
        raise click.UsageError("give a model's NAME, or --unfinished")
    if name is None:
        from pocketllava.download.transfer import clear

        clear(store)
        return
    full = store.find(name)
    about = row(store, full)
    if not yes and not sys.stdin.isatty():
        raise InputError(f"{full}: is removed with --yes only, where nobody can be asked")
    if not yes:
        click.confirm(
            f"remove {full} ({about['types']}, {about['size']}) from {store.root}?", abort=True, err=True
        )
    store.remove(full)
    click.echo(f"removed {full}", err=True)

"""`pocketllava verify`: the files of the store against their hashes."""

from __future__ import annotations

import click

from pocketllava.commands.common import complain
from pocketllava.commands.completion import Model
from pocketllava.errors import PocketLlavaError
from pocketllava.models.store import Store

FAILED = 1


@click.command()
@click.argument("name", required=False, type=Model(folders=False))
def verify(name: str | None) -> int:
    """Compare the SHA-256 of a model's files, or of all models', with the recorded ones.

    Of files that were downloaded these are the hub's, of a converted checkpoint those of the finished conversion.
    """
    from pocketllava.models import Bundle

    store = Store.default()
    damaged = 0
    for each in [store.find(name)] if name is not None else store.names():
        try:
            bundle = Bundle.open(store.folder(each))
            bundle.check_hashes()
            unread = [str(bundle.path_of(n)) for n, r in bundle.manifest.files.items() if r.sha256 is None]
            known = f"; of {', '.join(unread)} only size and header are recorded" if unread else ""
            click.echo(f"{each}: as recorded{known}")
        except PocketLlavaError as error:
            damaged += 1
            complain("error", str(error))
    return FAILED if damaged else 0

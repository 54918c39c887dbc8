"""`pocketllava completion`: what a shell needs to complete commands, options, and the models' names.

Knows click's own mechanism and the store's list of names; opens no model.
"""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem, get_completion_class

from pocketllava.commands.common import Place
from pocketllava.models.store import DEMO, Store

VARIABLE = "_POCKETLLAVA_COMPLETE"
PROGRAM = "pocketllava"
SHELLS = ("bash", "zsh", "fish")


class Model(Place):
    """A model: a name of the store, or a bundle's folder."""

    name = "NAME"

    def __init__(self, *, folders: bool = True) -> None:
        self._folders = folders

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Names that begin with the text; folders where a bundle's folder may be given."""
        del ctx, param
        names = [*Store.default().names(), *([DEMO] if self._folders else [])]
        items = [CompletionItem(name) for name in names if name.startswith(incomplete.lower())]
        return [*items, CompletionItem(incomplete, type="dir")] if self._folders else items


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands, options and names of models.

    \b
    bash:  eval "$(pocketllava completion bash)"            in ~/.bashrc
    zsh:   eval "$(pocketllava completion zsh)"             in ~/.zshrc, after compinit
    fish:  pocketllava completion fish | source             in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click's own three
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, PROGRAM, VARIABLE).source())

"""`pocketllava completion`: what a shell needs to complete commands, options, and the models' names.

Knows click's own mechanism, where bash breaks words, and the store's list of names; opens no model.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

from pocketllava.commands.common import Place
from pocketllava.errors import InputError
from pocketllava.models.store import DEMO, Store

VARIABLE = "_POCKETLLAVA_COMPLETE"
PROGRAM = "pocketllava"
SHELLS = ("bash", "zsh", "fish")


class Bash(BashComplete):
    """click's, for words with colons: bash takes name:tag for three words, and replaces the last of them."""

    _before = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one at the cursor, and that one, put together again."""
        args, incomplete = super().get_completion_args()
        if incomplete == ":" and args:
            args, incomplete = args[:-1], f"{args[-1]}:"
        elif len(args) > 2 and args[-1] == ":":
            args, incomplete = args[:-2], f"{args[-2]}:{incomplete}"
        self._before = incomplete[: incomplete.rfind(":") + 1]
        return args, incomplete

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """Folders first: click's script forgets what comes before them. bash shows them where no name fits."""
        return sorted(super().get_completions(args, incomplete), key=lambda item: bool(item.type == "plain"))

    def format_completion(self, item: CompletionItem) -> str:
        """A name without what stands before the cursor's word already."""
        return f"{item.type},{item.value.removeprefix(self._before)}"


add_completion_class(Bash)


class Model(Place):
    """A model: a name of the store, a bundle's folder, or a GGUF text model."""

    name = "NAME"

    def __init__(self, *, folders: bool = True) -> None:
        self._folders = folders

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself. Raises BackendError where there is no memory for the libraries that a model needs."""
        from pocketllava.models.limits import check_libraries

        check_libraries()
        return super().convert(value, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Names that begin with the text; files and folders where a bundle or a GGUF file may be given."""
        del ctx, param
        names = [DEMO] if self._folders else []
        with suppress(InputError):
            names += Store.default().names()
        items = [CompletionItem(name) for name in names if name.startswith(incomplete.lower())]
        return [*items, CompletionItem(incomplete, type="file")] if self._folders else items


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

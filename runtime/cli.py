"""The command line's entry: the group of commands, and errors as one line.

An error of ours is one line and exit code 1 (2 for wrong usage); a broken pipe and Ctrl-C end quietly.
"""

from __future__ import annotations

import sys

import click

from pocketllava.commands.ask import ask
from pocketllava.commands.bench import bench
from pocketllava.commands.chat import chat
from pocketllava.commands.common import show_warnings
from pocketllava.commands.convert import convert
from pocketllava.commands.demo import demo
from pocketllava.commands.evaluate import evaluate
from pocketllava.commands.imatrix import imatrix
from pocketllava.commands.inspect import inspect
from pocketllava.commands.quantize import quantize
from pocketllava.errors import PocketLlavaError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pocketllava")
def cli() -> None:
    """LLaVA-1.5 on a laptop, with the original model's own answers."""


for command in (convert, quantize, imatrix, ask, chat, inspect, demo, evaluate, bench):
    cli.add_command(command)


def main() -> None:
    """Entry point."""
    show_warnings()
    try:
        cli.main(prog_name="pocketllava", standalone_mode=True)
    except PocketLlavaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

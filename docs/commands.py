"""Writes docs/commands.md from the command line's own --help; tests/test_docs.py holds the page to it.

python docs/commands.py
"""

from __future__ import annotations

from pathlib import Path

import click

from pocketllava.cli import cli

PAGE = Path(__file__).with_name("commands.md")
WIDTH = 100  # columns, whatever the terminal has
HEAD = "# Commands\n\nEvery command's `--help`, written by `python docs/commands.py`.\n"


def page() -> str:
    """The page's Markdown: the group's help, then each command's."""
    settings = {**cli.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    root = click.Context(cli, info_name="pocketllava", **settings)
    parts = [HEAD, _block(cli.get_help(root))]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, parent=root, info_name=name)
        parts += [f"## {name}\n", _block(command.get_help(context))]
        for part in command.commands.values() if isinstance(command, click.Group) else ():
            help_text = part.get_help(click.Context(part, parent=context, info_name=part.name))
            parts += [f"### {name} {part.name}\n", _block(help_text)]
    return "\n".join(parts)


def _block(text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return f"```text\n{lines}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8", newline="\n")

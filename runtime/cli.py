"""The command line's entry: the group of commands, and errors as one line.

An error of ours is one line and exit code 1, wrong usage 2, Ctrl-C 130; a broken pipe ends quietly.
"""

from __future__ import annotations

import contextlib
import signal
import sys

import click

from pocketllava.commands.album import album
from pocketllava.commands.ask import ask
from pocketllava.commands.bench import bench
from pocketllava.commands.caption import caption
from pocketllava.commands.chat import chat
from pocketllava.commands.common import complain, show_warnings
from pocketllava.commands.completion import completion
from pocketllava.commands.convert import convert
from pocketllava.commands.demo import demo
from pocketllava.commands.doctor import doctor
from pocketllava.commands.evaluate import evaluate
from pocketllava.commands.find import find
from pocketllava.commands.imatrix import imatrix
from pocketllava.commands.import_model import import_model
from pocketllava.commands.inspect import inspect
from pocketllava.commands.list import list_models
from pocketllava.commands.plan import plan
from pocketllava.commands.pull import pull
from pocketllava.commands.quantize import quantize
from pocketllava.commands.rm import rm
from pocketllava.commands.serve import serve
from pocketllava.commands.show_model import show
from pocketllava.commands.streams import OutputError, flush_results, open_streams
from pocketllava.commands.verify import verify
from pocketllava.errors import OutOfMemory, PocketLlavaError
from pocketllava.models.limits import is_limited
from pocketllava.settings import nearest

SECTIONS = {
    "Ask about images": (demo, ask, chat, serve),
    "Caption and search folders": (caption, find, album),
    "Keep models": (pull, import_model, list_models, show, verify, rm),
    "Convert a checkpoint": (convert, quantize, imatrix),
    "Look and measure": (inspect, plan, doctor, evaluate, bench),
    "Shell": (completion,),
}
MAX_HELP = 200  # characters of a command's line in --help
FAILED = 1
INTERRUPTED = 130  # a shell's code for Ctrl-C


class Sections(click.Group):
    """Commands grouped in --help by what a person wants to do."""

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A list of commands a section."""
        width = max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                rows = [(f"{c.name:<{width}}", c.get_short_help_str(MAX_HELP)) for c in commands]
                formatter.write_dl(rows)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command for one that there is not."""
        if args[0] not in self.commands:
            ctx.fail(f"No such command {args[0]!r}{nearest(args[0], self.commands)}.".replace("?.", "?"))
        return super().resolve_command(ctx, args)


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pocketllava")
def cli() -> None:
    """LLaVA-1.5 and 1.6 on a laptop, with the original model's own answers."""


for section in SECTIONS.values():
    for command in section:
        cli.add_command(command)


def main() -> None:
    """Entry point."""
    open_streams()
    show_warnings()
    try:
        code = exit_code()
    except KeyboardInterrupt:  # a second one, while the first is being answered
        code = INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is the interpreter's own end
    sys.exit(code)


def exit_code() -> int:
    """Run the command that the arguments name; whatever goes wrong is one line."""
    try:
        code = cli.main(prog_name="pocketllava", standalone_mode=False)
        flush_results()
        return code if isinstance(code, int) else 0
    except (PocketLlavaError, OutputError) as error:
        if isinstance(error, OutOfMemory) and error.plan:
            click.echo(error.plan, err=True)
        complain("error", str(error))
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo(err=True)
        return INTERRUPTED
    except OSError as error:  # a folder that vanished, a disk that fails: commands cannot foresee them all
        name = f"{error.filename}: " if error.filename else ""
        complain("error", f"{name}{error.strerror or error}")
    except MemoryError:
        complain("error", "memory: found none free; close other programs, or take a smaller --ctx or model")
    except (ImportError, RuntimeError):  # a library that found no room for itself
        if not is_limited():
            raise
        complain(
            "error", "memory: a limit (ulimit -v, ulimit -d) leaves too little for the libraries; raise it"
        )
    finally:
        with contextlib.suppress(OSError, OutputError):
            flush_results()
    return FAILED


if __name__ == "__main__":
    main()

"""`pocketllava chat`: a conversation in the terminal, or over pipes.

Answers go to stdout, everything else to stderr. What a line means is slash.py's business, keys are terminal.py's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import MEGA, load_options, sampling_options
from pocketllava.commands.show import timing_line
from pocketllava.errors import ContextOverflow, PocketLlavaError

if TYPE_CHECKING:
    from pocketllava import Chunk, Llava, Options
    from pocketllava.chat.dialogue import Dialogue, Question
    from pocketllava.chat.wrap import Wrap

_KEPT = {ord(c): c for c in "\n\t"}
_INERT: dict[int, str] = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}") | _KEPT
SEEDS = 2**32
MAX_LOOKED_AT = 4096  # characters of a line that is read again with every key
HINT = "; /clear forgets the conversation, --shift leaves out its oldest turns"
WELCOME = "Drop in an image or type its path, and ask. /help says more, Ctrl-D leaves."
LEAVING = "Ctrl-D or /quit leaves"


@click.command()
@click.argument("model", metavar="BUNDLE")
@click.argument("images", metavar="[IMAGE]...", nargs=-1)
@click.option("--system", metavar="TEXT", help="A system message before the conversation.")
@click.option("--load", "saved", metavar="FILE", help="Go on with a conversation that /save wrote.")
@sampling_options
@click.option("--shift", is_flag=True, help="Leave out the oldest turns once the conversation does not fit.")
@click.option("--stats", is_flag=True, help="Show timings after every answer.")
@load_options
@click.option(
    "--max-pixels", type=click.IntRange(1), default=50 * MEGA, show_default=True, help="Refuse larger images."
)
def chat(
    model: str,
    images: tuple[str, ...],
    system: str | None,
    saved: str | None,
    shift: bool,
    stats: bool,
    max_pixels: int,
    load: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Talk about images, or without them.

    BUNDLE is a folder made by `convert`, or the name `demo`. Drop images in or type their paths; /help says
    what else there is. Reads one message a line where stdin is not a terminal.
    """
    from pocketllava import Llava, Options
    from pocketllava.chat.dialogue import Dialogue, Gallery, bundle_id
    from pocketllava.chat.slash import loaded, show
    from pocketllava.names import open_bundle

    options = Options(shift=shift, **sampling)
    on_terminal = sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")  # an answer may hold what a terminal's encoding lacks
    bundle = open_bundle(model)
    dialogue = Dialogue(Gallery(bundle.preprocessing, max_pixels), bundle_id(bundle))
    lines = list(loaded(dialogue, Path(saved).expanduser()).lines) if saved else []
    dialogue.system = dialogue.system if system is None else system
    lines += show(dialogue, [dialogue.gallery.open(image) for image in images]).lines
    if on_terminal:
        note(f"loading {bundle.folder.name} ...")
    with Llava.load(model, max_pixels=max_pixels, **load) as llava:
        if on_terminal:
            note(WELCOME)
        for line in lines:
            note(line)
        Chat(llava, dialogue, options, stats, on_terminal).run()


class Chat:
    """A conversation between whoever types and a model."""

    def __init__(
        self, llava: Llava, dialogue: Dialogue, options: Options, stats: bool, on_terminal: bool
    ) -> None:
        self._llava, self._dialogue, self._options = llava, dialogue, options
        self._stats, self._on_terminal = stats, on_terminal
        self._named: tuple[Path, ...] = ()
        self._retries = 0
        self._wrap = wrap() if on_terminal and sys.stdout.isatty() else None
        dialogue.n_ctx = llava.n_ctx

    def run(self) -> None:
        """Take up lines until there are no more."""
        self._prepare()
        if self._on_terminal:
            self._run_on_terminal()
            return
        for line in sys.stdin:
            if not self.take(line):
                return

    def _run_on_terminal(self) -> None:
        from pocketllava.chat.slash import COMMANDS
        from pocketllava.chat.terminal import Terminal

        commands = {name: command.help for name, command in COMMANDS.items() if command.help}
        terminal = Terminal(commands, history_file(), self.look_ahead)
        going_on = True
        while going_on:
            try:
                line = terminal.read()
                with terminal.unechoed():
                    going_on = self.take(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                note(LEAVING)

    def take(self, line: str) -> bool:
        """Take up one line; False to leave."""
        from pocketllava.chat.slash import handle

        try:
            step = handle(self._dialogue, line.encode("utf-8", "replace").decode())
        except PocketLlavaError as error:
            complain(str(error))
            return True
        for told in step.lines:
            note(told)
        if step.prepare:
            self._prepare()
        if step.question:
            self._answer(step.question)
            if self._on_terminal:
                click.echo(err=True)
        return not step.leave

    def _answer(self, question: Question) -> None:
        """Stream an answer into the conversation, which stays as it was if there is none."""
        text, last = "", None
        try:
            with closing(self._stream(question)) as chunks:
                for last in chunks:
                    text += last.text
                    self._say(last.text)
        except KeyboardInterrupt:
            if not self._on_terminal:
                raise
            self._end_line(bool(text) and not text.endswith("\n"))
            self._keep(question, text, None)
            note("(stopped)" if text.strip() else "(stopped before the answer began)")
        except PocketLlavaError as error:
            self._end_line(bool(text) and not text.endswith("\n"))
            self._dialogue.failed(question)
            complain(f"{error}{HINT if isinstance(error, ContextOverflow) else ''}")
        else:
            self._end_line(True)
            self._keep(question, text, last)

    def _stream(self, question: Question) -> Generator[Chunk, None, None]:
        """The answer's pieces; with a seed, a repeated question takes the next one."""
        from pocketllava.engine.background import in_background

        again = question.at < len(self._dialogue.turns)
        self._retries = self._retries + 1 if again else 0
        seed = self._options.seed
        options = replace(self._options, seed=None if seed is None else (seed + self._retries) % SEEDS)
        return in_background(self._llava.stream, self._dialogue.messages(question), options=options)

    def _keep(self, question: Question, text: str, last: Chunk | None) -> None:
        """Take what was answered into the conversation, and say what is odd about it; last: None if it was stopped."""
        if last is None and not text.strip():
            self._dialogue.failed(question)
            return
        again = question.at < len(self._dialogue.turns)
        timings = last.timings if last else None
        self._dialogue.answered(question, text, timings)
        if not last or not timings:
            return
        if timings.left_out:
            note(f"(the oldest {timings.left_out} messages were left out)")
        if last.finish_reason == "length":
            limit = self._options.max_tokens
            full = timings.answer_tokens < limit
            note("(the context is full; /clear makes room)" if full else f"(cut off at --max-tokens {limit})")
        if again and text == question.turn.answer and not self._options.temperature:
            note("(the same answer: at --temperature 0 it is always the likeliest one)")
        if self._stats:
            note(timing_line(timings))

    def _say(self, text: str) -> None:
        """A piece of an answer."""
        shown = text.translate(_INERT) if self._on_terminal else text
        click.echo(self._wrap.add(shown) if self._wrap else shown, nl=False)
        sys.stdout.flush()

    def _end_line(self, needed: bool) -> None:
        """What is left of an answer, and a line's end."""
        click.echo(self._wrap.finish() if self._wrap else "", nl=needed)

    def _prepare(self) -> None:
        """Let the images be worked on in the background."""
        if ahead := self._dialogue.to_prepare():
            self._llava.prepare(ahead[0], after=ahead[1])

    def look_ahead(self, line: str) -> None:
        """Work on the images of a line that is still being typed."""
        from pocketllava.chat.image_paths import find_images

        named = find_images(line.removeprefix("/image ")).images if len(line) < MAX_LOOKED_AT else ()
        if named == self._named:
            return
        self._named = named
        with suppress(OSError):
            data = [path.read_bytes() for path in named]
            waiting = [picture.data for picture in self._dialogue.waiting]
            if data:
                self._llava.prepare([*waiting, *data], after=self._dialogue.messages())


def wrap() -> Wrap:
    """Breaks lines as wide as this terminal is at the time."""
    from shutil import get_terminal_size

    from pocketllava.chat.wrap import Wrap

    return Wrap(lambda: get_terminal_size().columns)


def note(text: str) -> None:
    """A line beside the conversation."""
    click.secho(text.translate(_INERT), err=True, dim=True, color=_color())


def complain(text: str) -> None:
    """A line about what is wrong."""
    line = " ".join(text.translate(_INERT).splitlines())
    click.echo(f"{click.style('error:', fg='red')} {line}", err=True, color=_color())


def _color() -> bool | None:
    """No, where somebody asked for none (no-color.org); else click looks for a terminal."""
    return False if os.environ.get("NO_COLOR") else None


def history_file() -> Path:
    """Where this user's lines are remembered."""
    from platformdirs import user_state_path

    return user_state_path("pocketllava", appauthor=False) / "chat_history"

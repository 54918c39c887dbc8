"""`pocketllava chat`: a conversation in the terminal, or over pipes.

Answers go to stdout, everything else to stderr. Lines are interpreted in chat/slash.py, keys in chat/terminal.py.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import (
    INERT,
    Place,
    Text,
    color,
    complain,
    load_options,
    pair_of,
    quiet_option,
    sampling_options,
)
from pocketllava.commands.completion import Model
from pocketllava.commands.show import timing_line
from pocketllava.commands.waiting import Waiting, shown
from pocketllava.errors import ContextOverflow, PocketLlavaError
from pocketllava.models.files import expanded
from pocketllava.types import MAX_FILE_BYTES, MAX_SEED, ImageSource

if TYPE_CHECKING:
    from pocketllava import Bundle, Chunk, Llava, Options
    from pocketllava.chat.dialogue import Dialogue, Examine, Question
    from pocketllava.chat.wrap import Wrap

MAX_AHEAD = 4096  # characters of a line that is searched for images with every key
HINT = "; /clear forgets the conversation, --truncate leaves out its oldest turns"
WELCOME = "Drop in an image or type its path, and ask. /help says more, Ctrl-D leaves."
LEAVING = "Ctrl-D or /quit leaves"


@click.command()
@click.argument("model", metavar="BUNDLE", type=Model())
@click.argument("images", metavar="[IMAGE]...", nargs=-1, type=Place())
@click.option(
    "-sys", "--system", metavar="TEXT", type=Text(), help="A system message before the conversation."
)
@click.option(
    "--load", "saved", metavar="FILE", type=Place(), help="Continue a conversation that /save wrote."
)
@sampling_options("schema", "choices", "top_logprobs")
@click.option("--stats", is_flag=True, help="Show timings after every answer.")
@quiet_option("No welcome.")
@load_options
def chat(
    model: str,
    images: tuple[str, ...],
    system: str | None,
    saved: str | None,
    stats: bool,
    quiet: bool,
    load: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Talk about images, or without them.

    BUNDLE is a folder made by `convert`, or the name `demo`. Drop images in or type their paths; /help lists the
    rest. Reads one message a line where stdin is not a terminal.
    """
    from pocketllava import Llava, Options
    from pocketllava.chat.dialogue import Dialogue, Gallery, bundle_id
    from pocketllava.chat.slash import attach
    from pocketllava.chat.slash import load as load_conversation
    from pocketllava.names import open_bundle

    options = Options(**sampling)
    on_terminal = sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())
    bundle = open_bundle(model, **pair_of(load))
    dialogue = Dialogue(Gallery(examination(bundle, load["max_pixels"])), bundle_id(bundle))
    lines = list(load_conversation(dialogue, expanded(saved)).lines) if saved else []
    dialogue.system = dialogue.system if system is None else system
    lines += attach(dialogue, [dialogue.gallery.open(image) for image in images]).lines
    welcome = on_terminal and not quiet
    if welcome:
        note(f"loading {bundle.folder.name} ...")
    with Llava.load(model, **load) as llava:
        for line in [WELCOME, *lines] if welcome else lines:
            note(line)
        Chat(llava, dialogue, options, stats, on_terminal).run()


class Chat:
    """A conversation between whoever types and a model."""

    def __init__(
        self, llava: Llava, dialogue: Dialogue, options: Options, stats: bool, on_terminal: bool
    ) -> None:
        self._llava, self._dialogue, self._options = llava, dialogue, options
        self._stats, self._on_terminal = stats, on_terminal
        self._images_ahead: tuple[Path, ...] = ()
        self._retries = self._n_failed = 0
        self._wrap = wrap() if on_terminal and sys.stdout.isatty() else None
        dialogue.n_ctx = llava.n_ctx

    def run(self) -> None:
        """Read lines until there are no more."""
        self._prefill()
        if self._on_terminal:
            self._run_on_terminal()
            return
        for line in sys.stdin:
            if not self.handle(line.removeprefix("\ufeff")):
                break
        if self._n_failed and not self._dialogue.turns:
            raise click.exceptions.Exit(1)

    def _run_on_terminal(self) -> None:
        from pocketllava.chat.slash import COMMANDS
        from pocketllava.chat.terminal import Terminal

        commands = {name: command.help for name, command in COMMANDS.items() if command.help}
        terminal = Terminal(commands, history_file(), self.look_ahead)
        leave = False
        while not leave:
            try:
                line = terminal.read()
                with terminal.unechoed():
                    leave = not self.handle(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                note(LEAVING)

    def handle(self, line: str) -> bool:
        """Do what one line asks for; False to leave."""
        from pocketllava.chat.slash import handle

        try:
            step = handle(self._dialogue, line.encode("utf-8", "replace").decode())
        except PocketLlavaError as error:
            self._n_failed += 1
            complain("error", str(error))
            return True
        for text in [*([timing_line(step.timings)] if step.timings else []), *step.lines]:
            note(text)
        if step.prefill:
            self._prefill()
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
                    self._show(last.text)
        except KeyboardInterrupt:
            if not self._on_terminal:
                raise
            self._end_line(bool(text) and not text.endswith("\n"))
            self._add(question, text, None)
            note("(stopped)" if text.strip() else "(stopped before the answer began)")
        except PocketLlavaError as error:
            self._end_line(bool(text) and not text.endswith("\n"))
            self._dialogue.add_failure(question)
            self._n_failed += 1
            complain("error", f"{error}{HINT if isinstance(error, ContextOverflow) else ''}")
        else:
            self._end_line(True)
            self._add(question, text, last)

    def _stream(self, question: Question) -> Generator[Chunk, None, None]:
        """The answer's pieces; with a seed, a repeated question takes the next one."""
        from pocketllava.engine.background import in_background

        again = question.index < len(self._dialogue.turns)
        self._retries = self._retries + 1 if again else 0
        seed = self._options.seed
        options = replace(
            self._options, seed=None if seed is None else (seed + self._retries) % (MAX_SEED + 1)
        )
        waiting = Waiting()
        messages = self._dialogue.messages(question)
        return shown(
            in_background(self._llava.stream, messages, options=options, on_progress=waiting), waiting
        )

    def _add(self, question: Question, text: str, last: Chunk | None) -> None:
        """Add an answer to the conversation, with a note if it is unusual. last: None if it was stopped."""
        if last is None and not text.strip():
            self._dialogue.add_failure(question)
            return
        again = question.index < len(self._dialogue.turns)
        timings = last.timings if last else None
        self._dialogue.add_answer(question, text, timings)
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

    def _show(self, text: str) -> None:
        """Show a piece of an answer."""
        shown = text.translate(INERT) if self._on_terminal else text
        click.echo(self._wrap.add(shown) if self._wrap else shown, nl=False)
        sys.stdout.flush()

    def _end_line(self, needed: bool) -> None:
        """Show the rest of an answer, and the line's end."""
        click.echo(self._wrap.finish() if self._wrap else "", nl=needed)

    def _prefill(self) -> None:
        """Evaluate the images in the background."""
        if ahead := self._dialogue.to_prefill():
            self._llava.prefill(ahead[0], after=ahead[1])

    def look_ahead(self, line: str) -> None:
        """Evaluate the images of a line while it is being typed."""
        from pocketllava.chat.image_paths import find_images
        from pocketllava.models.files import read_regular

        images = find_images(line.removeprefix("/image ")).images if len(line) < MAX_AHEAD else ()
        if images == self._images_ahead:
            return
        self._images_ahead = images
        with suppress(OSError):
            data = [read_regular(path, MAX_FILE_BYTES) for path in images]
            waiting = [picture.data for picture in self._dialogue.waiting]
            if data:
                self._llava.prefill([*waiting, *data], after=self._dialogue.messages())


def examination(bundle: Bundle, max_pixels: int | None) -> Examine:
    """The check that an image can be shown to this model."""
    from pocketllava.vision.decoding import MAX_PIXELS
    from pocketllava.vision.image import decode, resize_and_crop
    from pocketllava.vision.sources import name_of, read

    def examine(source: ImageSource) -> tuple[int, int]:
        picture = decode(read(source), name_of(source), max_pixels or MAX_PIXELS)
        resize_and_crop(picture, bundle.preprocessing)
        return picture.size

    return examine


def wrap() -> Wrap:
    """Breaks lines at this terminal's width, which may change."""
    from shutil import get_terminal_size

    from pocketllava.chat.wrap import Wrap

    return Wrap(lambda: get_terminal_size().columns)


def note(text: str) -> None:
    """A line beside the conversation."""
    click.secho(text.translate(INERT), err=True, dim=True, color=color())


def history_file() -> Path:
    """The file of this user's earlier lines."""
    from platformdirs import user_state_path

    return user_state_path("pocketllava", appauthor=False) / "chat_history"

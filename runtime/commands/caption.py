"""`pocketllava caption`: a question, or several, about every picture of folders; what was answered is in an album."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import (
    ParamType,
    Place,
    Text,
    load_options,
    pair_of,
    quiet_option,
    sampling_options,
)
from pocketllava.commands.exporting import ALBUM_SUFFIX, export_options, show_report
from pocketllava.commands.running import Bar, Lines, Show
from pocketllava.models.files import expanded
from pocketllava.models.plan_text import size

if TYPE_CHECKING:
    from pocketllava.album.captioner import Plan
    from pocketllava.album.export import Export
    from pocketllava.album.exporting import Exported
    from pocketllava.album.walk import Count, Shard, Walk
    from pocketllava.models import Bundle

COUNT_S = 0.6  # the first line comes within a second, whatever there is to be counted
SOME_FAILED = 3
INTERRUPTED = 130


class ShardType(ParamType):
    """I/N: part I of N."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from pocketllava.album.walk import Shard

        index, _, count = str(value).partition("/")
        if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return Shard(int(index), int(count))
        return self.fail(
            f"found {value!r}, expected I/N, such as 1/4 for the first of four parts", param, ctx
        )


class BatchType(ParamType):
    """A number of answers, or auto."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from pocketllava.engine.many import MAX_AT_ONCE

        if str(value).lower() == "auto":
            return "auto"
        if str(value).isdecimal() and 1 <= int(value) <= MAX_AT_ONCE:
            return int(value)
        return self.fail(f"found {value!r}, expected a number from 1 to {MAX_AT_ONCE}, or auto", param, ctx)


@dataclass(frozen=True)
class _Flags:
    """Options of the run itself."""

    recursive: bool
    shard: Shard | None
    limit: int | None
    retry_errors: bool
    deny: tuple[str, ...]
    like: bool
    dry_run: bool
    as_json: bool
    quiet: bool
    batch: Any
    every: float | None


@click.command()
@click.argument("model", metavar="BUNDLE", type=Place())
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=Place())
@click.option("-r", "--recursive", is_flag=True, help="Folders within folders too.")
@click.option(
    "-p",
    "--prompt",
    metavar="TEXT",
    type=Text("a question"),
    multiple=True,
    help="The question; repeatable; {name}, {directory}, {tags}: the picture's.  [default: Describe the image.]",
)
@click.option("--prompts", metavar="FILE", type=Place(), help="Questions, one a line, instead of --prompt.")
@click.option(
    "--album",
    "album_path",
    metavar="FILE",
    type=Place(),
    help="Where the answers are kept.  [default: FOLDER.album beside the folder]",
)
@click.option("--shard", metavar="I/N", type=ShardType(), help="Only part I of N, by each picture's path.")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="The first N pictures only.")
@click.option(
    "--batch", metavar="N|auto", type=BatchType(), default=1,
    help="Answers decoded at once, of one prompt; 1: exactly what `ask` gives.  [default: 1]",
)  # fmt: skip
@click.option("--retry-errors", is_flag=True, help="Try again what failed in earlier runs.")
@click.option(
    "--deny",
    metavar="REGEX",
    multiple=True,
    type=Text("an expression"),
    help='Mark answers in which it is found as refusals, such as "as an ai|sorry"; repeatable.',
)
@click.option(
    "--like/--no-like", default=True, help="Keep image features for `find --like`.  [default: like]"
)
@click.option(
    "--every", metavar="SECONDS", type=click.FloatRange(1),
    help="Write the export's file so often meanwhile, too; files beside pictures are written as captions come.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@export_options
@sampling_options("truncate", "top_logprobs")
@load_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object an event.")
@quiet_option("No progress bar.")
def caption(
    model: str,
    paths: tuple[str, ...],
    prompt: tuple[str, ...],
    prompts: str | None,
    album_path: str | None,
    export: Export | None,
    load: dict[str, Any],
    sampling: dict[str, Any],
    **flags: Any,
) -> int:
    """Ask about every picture of folders, and keep the answers.

    BUNDLE is a folder made by `convert`, or the name `demo`. A PATH is a picture or a folder. Answers go into an
    album, which is the run's journal too: the same command goes on where it was stopped, and does not open pictures
    again that did not change. `find` searches it, `album export` writes it in other programs' formats.

    \b
    pocketllava caption demo photos -r
    pocketllava caption demo photos --prompts questions.txt --json
    pocketllava caption demo dataset --prefix "ohwx, " --to txt
    pocketllava caption demo products --schema product.json --shard 1/4
    """
    from pocketllava import Options
    from pocketllava.album.captioner import Plan
    from pocketllava.album.export import check
    from pocketllava.album.prompts import DEFAULT_PROMPT, questions, read_prompts
    from pocketllava.album.quality import patterns
    from pocketllava.album.walk import Count, Walk
    from pocketllava.names import open_bundle

    if prompt and prompts:
        raise click.UsageError("--prompt and --prompts exclude each other")
    run = _Flags(**flags)
    walk = Walk(tuple(str(expanded(path)) for path in paths), run.recursive)
    count = Count(walk)
    bundle = open_bundle(model, **pair_of(load))
    texts = read_prompts(expanded(prompts)) if prompts else [*dict.fromkeys(prompt)] or [DEFAULT_PROMPT]
    options = Options(**sampling)
    plan = Plan(
        walk, questions(bundle, texts, options, load), options, run.shard, run.limit, run.retry_errors, run.like,
        tuple(patterns(run.deny)), run.batch,
    )  # fmt: skip
    path = expanded(album_path) if album_path else default_album(walk)
    exported = _exported(export, run.every)
    show: Show = Lines() if run.as_json else Bar(run.quiet)
    try:
        count.wait(COUNT_S)
        show.start(_first_line(bundle, load, plan, path, count), count, plan)
        if exported is not None:
            check(exported.export, plan.walk)
        if run.dry_run:
            _show_dry(path, plan, show)
            return 0
        return _captioned(model, path, plan, load, exported, show)
    finally:
        count.stop()


def default_album(walk: Walk) -> Path:
    """Beside the folder, where there is one; else in the current folder."""
    if len(walk.paths) == 1 and Path(walk.paths[0]).is_dir():
        folder = Path(walk.root)
        if folder.name:
            return folder.with_name(folder.name + ALBUM_SUFFIX)
    return Path("captions" + ALBUM_SUFFIX)


def _exported(export: Export | None, every_s: float | None) -> Exported | None:
    from pocketllava.album.exporting import Exported

    if export is None and every_s is not None:
        raise click.UsageError("--every needs --to FORMAT")
    return Exported(export, every_s) if export is not None else None


def _captioned(
    model: str, path: Path, plan: Plan, load: dict[str, Any], exported: Exported | None, show: Show
) -> int:
    from pocketllava import Llava
    from pocketllava.album.captioner import run
    from pocketllava.album.journal import Album
    from pocketllava.engine.background import in_background

    with ExitStack() as stack:
        album = stack.enter_context(Album(path, root=plan.walk.root))
        llava = stack.enter_context(Llava.load(model, **load))
        finish = stack.enter_context(finish_on_interrupt(show))
        captioned = exported.events if exported is not None else run
        events = in_background(captioned, llava, album, plan, finish=finish.is_set)
        stack.callback(events.close)
        for event in events:
            show.event(event)
        show.end(path, stopped=finish.is_set())
        if exported is not None:
            show_report(exported.report, exported.export)
        if finish.is_set():
            return INTERRUPTED
    return SOME_FAILED if show.failed else 0


@contextmanager
def finish_on_interrupt(show: Show) -> Iterator[threading.Event]:
    """The first Ctrl-C lets the running pictures end; the second one is as everywhere."""
    finish = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def stop(_number: int, _frame: Any) -> None:
        finish.set()
        show.say("stopping after what is running; Ctrl-C once more stops at once")
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield finish
    finally:
        signal.signal(signal.SIGINT, before)


def _first_line(bundle: Bundle, load: dict[str, Any], plan: Plan, path: Path, count: Count) -> str:
    from pocketllava.engine.loading import planned
    from pocketllava.types import load_options as checked

    pictures = f"{'' if count.done else 'more than '}{count.found:,} pictures"
    n, shard = len(plan.questions), plan.shard
    part = f", part {shard.index} of {shard.count}" if shard else ""
    part += f", the first {plan.limit:,}" if plan.limit else ""
    asked = repr(plan.questions[0].prompt) if n == 1 else f"{n} questions each"
    needed = size(planned(bundle, checked(**load)).total)
    return f"{pictures}{part}; {asked}; {bundle.folder.resolve().name} takes {needed}; album {path}"


def _show_dry(path: Path, plan: Plan, show: Show) -> None:
    from pocketllava.album.captioner import to_do
    from pocketllava.album.journal import Album

    if path.exists():
        with Album(path) as album:
            show.say(f"to be asked: {to_do(album, plan):,} pictures; nothing was done")
    else:
        show.say("to be asked: all of them; nothing was done")

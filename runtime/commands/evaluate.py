"""`pocketllava eval`: how often a bundle's answers are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import Place, load_options, pair_of, quiet_option
from pocketllava.commands.completion import Model
from pocketllava.commands.show import summary_lines
from pocketllava.models.files import expanded

if TYPE_CHECKING:
    from pocketllava import Bundle
    from pocketllava.measure.accuracy import Result, ResultsFile

STDOUT = "-"


@click.command("eval")
@click.argument("model", metavar="BUNDLE", type=Model())
@click.option(
    "--set",
    "questions",
    default="scenes",
    show_default=True,
    metavar="scenes|FILE.jsonl",
    type=Place(),
    help="Held-out drawn scenes, or lines of {image, question, answer or answers}.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="Questions at most [default: 1000 scenes, the whole file]."
)
@click.option(
    "--results",
    metavar="FILE",
    type=Place(),
    help="Where every answer goes, - for stdout; a run that was stopped goes on from it"
    " [default: MODEL.SET.results.jsonl].",
)
@load_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quiet_option("No progress bar.")
def evaluate(
    model: str,
    questions: str,
    limit: int | None,
    results: str | None,
    as_json: bool,
    quiet: bool,
    load: dict[str, Any],
) -> None:
    """Measure how often a bundle's answers are right.

    Exact match after normalizing, VQA's soft match, and for yes/no questions POPE's precision and recall.
    """
    from tqdm import tqdm

    from pocketllava import Llava
    from pocketllava.measure.accuracy import header, items, run, summary
    from pocketllava.names import open_bundle

    bundle = open_bundle(model, **pair_of(load))
    chosen = list(items(questions, limit))
    with (
        _results(results, bundle, questions, header(bundle, questions)) as file,
        Llava.load(model, **load) as llava,
    ):
        answered = []
        for result in tqdm(
            run(llava, chosen, file.done), total=len(chosen), unit="question", disable=True if quiet else None
        ):
            file.add(result)
            answered.append(result)
    table = summary(answered)
    printed = results == STDOUT
    click.echo(json.dumps(table) if as_json else "\n".join(summary_lines(table)), err=printed)
    if not printed:
        click.echo(f"answers: {file.path}", err=True)


def _results(
    results: str | None, bundle: Bundle, questions: str, header: dict[str, Any]
) -> ResultsFile | _Printed:
    """Where the answers go. Raises InputError."""
    from pocketllava.measure.accuracy import SCENES, ResultsFile

    if results == STDOUT:
        return _Printed(header)
    name = "scenes" if questions == SCENES else expanded(questions).stem
    default = f"{bundle.folder.resolve().name}.{name}.results.jsonl"
    return ResultsFile(expanded(results) if results is not None else Path(default), header)


class _Printed:
    """stdout in the place of a file of results."""

    path = Path(STDOUT)

    def __init__(self, header: dict[str, Any]) -> None:
        self.done: dict[str, Result] = {}
        click.echo(json.dumps(header))

    def __enter__(self) -> _Printed:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, result: Result) -> None:
        """Print a result."""
        from pocketllava.measure.accuracy import line_of

        click.echo(line_of(result))

"""`pocketllava eval`: how often a bundle's answers are right."""

from __future__ import annotations

import json
from typing import Any

import click

from pocketllava.commands.common import load_options, quiet_option
from pocketllava.commands.show import summary_lines


@click.command("eval")
@click.argument("model", metavar="BUNDLE")
@click.option(
    "--set",
    "questions",
    default="scenes",
    show_default=True,
    metavar="scenes|FILE.jsonl",
    help="Held-out drawn scenes, or lines of {image, question, answer or answers}.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="Questions at most [default: 1000 scenes, the whole file]."
)
@click.option(
    "--results",
    metavar="FILE",
    help="Where every answer goes; a run that was stopped goes on from it [default: MODEL.SET.results.jsonl].",
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
    from pathlib import Path

    from tqdm import tqdm

    from pocketllava import Llava
    from pocketllava.measure.accuracy import SCENES, ResultsFile, header, items, run, summary

    with Llava.load(model, **load) as llava:
        chosen = list(items(questions, limit))
        name = "scenes" if questions == SCENES else Path(questions).stem
        file = ResultsFile(
            Path(results or f"{llava.bundle.folder.name}.{name}.results.jsonl"),
            header(llava.bundle, questions),
        )
        answered = []
        for result in tqdm(
            run(llava, chosen, file.done), total=len(chosen), unit="question", disable=True if quiet else None
        ):
            file.add(result)
            answered.append(result)
    table = summary(answered)
    click.echo(json.dumps(table) if as_json else "\n".join(summary_lines(table)))
    click.echo(f"answers: {file.path}", err=True)

"""`pocketllava ask`: one question about images."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from pocketllava.commands.common import MEGA, image_argument, load_options, sampling_options, stream


@click.command()
@click.argument("model", metavar="BUNDLE")
@click.argument("image", metavar="IMAGE")
@click.argument("question")
@click.option(
    "--image",
    "more_images",
    multiple=True,
    metavar="IMAGE",
    help="A further image, after the first; repeatable.",
)
@click.option("--system", metavar="TEXT", help="A system message before the question.")
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer; repeatable.")
@load_options
@click.option(
    "--max-pixels", type=click.IntRange(1), default=50 * MEGA, show_default=True, help="Refuse larger images."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
def ask(
    model: str,
    image: str,
    question: str,
    more_images: tuple[str, ...],
    system: str | None,
    stop: tuple[str, ...],
    max_pixels: int,
    as_json: bool,
    load: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Ask about an image: a path, - for stdin, or a data URI.

    BUNDLE is a folder made by `convert`, or the name `demo`. The answer streams to stdout, timings go to stderr.
    """
    from pocketllava import Llava, Options
    from pocketllava.types import conversation

    options = Options(stop=stop, **sampling)
    images = [image_argument(i) for i in (image, *more_images)]
    with Llava.load(model, max_pixels=max_pixels, **load) as llava:
        if as_json:
            answer = llava.ask(images, question, options=options, system=system)
            fields = {**asdict(answer), "tokens_per_s": round(answer.timings.tokens_per_s, 2)}
            click.echo(json.dumps(fields, ensure_ascii=False))
        else:
            stream(llava, conversation(images, question, system), options)

"""`pocketllava bench`: where the time goes on this machine."""

from __future__ import annotations

import json
from typing import Any

import click

from pocketllava.commands.common import Place, image_argument, load_options, quiet_option
from pocketllava.commands.completion import Model
from pocketllava.commands.show import figure_lines


@click.command()
@click.argument("model", metavar="BUNDLE", type=Model())
@click.option("--image", metavar="IMAGE", type=Place(), help="Ask about this picture instead of a drawn one.")
@click.option(
    "-n", "--runs", type=click.IntRange(1), default=3, show_default=True, help="Medians of this many."
)
@click.option(
    "--tokens", type=click.IntRange(1), default=64, show_default=True, help="Tokens of an answer at most."
)
@load_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@quiet_option("No progress bar.")
def bench(
    model: str, image: str | None, runs: int, tokens: int, load: dict[str, Any], as_json: bool, quiet: bool
) -> None:
    """Measure image encoding, prompt evaluation, first tokens and decoding.

    Every run asks about new pictures: the given one with a little noise in its middle. Close other programs first:
    llama.cpp's threads wait by spinning, and slow each other down.
    """
    from tqdm import tqdm

    from pocketllava import Llava
    from pocketllava.measure.speed import STEPS_PER_RUN, loaded, machine
    from pocketllava.measure.speed import bench as measure
    from pocketllava.models.demo.picture import drawn_picture
    from pocketllava.vision.image import load as load_image

    picture = load_image(image_argument(image) if image is not None else drawn_picture())
    with (
        Llava.load(model, **load) as llava,
        tqdm(total=runs * STEPS_PER_RUN, unit="question", disable=True if quiet else None) as bar,
    ):
        figures = measure(llava, picture, runs=runs, tokens=tokens, progress=bar.update)
        about = {**machine(), **loaded(llava), "runs": runs, "tokens": tokens}
    if as_json:
        table = {"machine": about, "load": load, "figures": {f.name: f.to_json() for f in figures}}
        click.echo(json.dumps(table, ensure_ascii=False, default=str))
        return
    click.echo("\n".join(figure_lines(about, figures)))

"""`pocketllava inspect`: a bundle's parts and memory, or one picture followed through the model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import Place, Text, image_argument, pair_options, refuse, setting_option
from pocketllava.commands.completion import Model
from pocketllava.commands.show import drift_line, memory_line, trace_lines, tree
from pocketllava.errors import InputError
from pocketllava.models.files import atomic_write
from pocketllava.types import LoadOptions

if TYPE_CHECKING:
    from PIL import Image


@click.command()
@click.argument("model", metavar="BUNDLE", type=Model())
@click.option("--image", metavar="IMAGE", type=Place(), help="Follow this picture through the model.")
@click.option(
    "--question",
    default="What is in the image?",
    type=Text(),
    show_default=True,
    help="The question with --image.",
)
@setting_option(LoadOptions, "image_tokens")
@click.option(
    "--save", metavar="FILE", help="Draw the picture of --image as the model sees it, patch by patch, in PNG."
)
@click.option("--check", is_flag=True, help="Compare both files' SHA-256 with the recorded ones.")
@setting_option(LoadOptions, "n_ctx")
@setting_option(LoadOptions, "kv_type")
@pair_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(
    model: str,
    image: str | None,
    question: str,
    image_tokens: int | None,
    save: str | None,
    check: bool,
    n_ctx: int | None,
    kv_type: str,
    as_json: bool,
    pair: dict[str, Any],
) -> None:
    """Show a bundle's three parts with shapes and types and the memory that it takes, or follow one picture."""
    from pocketllava.models.machine import available_bytes
    from pocketllava.models.memory import memory
    from pocketllava.names import open_bundle

    if image is None:
        refuse("without --image IMAGE", "question", "image_tokens", "save")
    else:
        refuse("with --image: it shows the memory that a context takes", "n_ctx", "kv_type")
    bundle = open_bundle(model, **pair)
    if check:
        bundle.check_hashes()
    if image is not None:
        from pocketllava import Llava
        from pocketllava.measure.device_drift import device_drift

        with Llava.load(model, n_gpu_layers=0, **pair) as llava:
            source = image_argument(image)
            trace = llava.trace(source, question, image_tokens=image_tokens)
            if save is not None:
                _save(llava.view(source, image_tokens=image_tokens), Path(save))
            with llava.session() as session:
                drifts = device_drift(session, source)
        if as_json:
            click.echo(json.dumps({**asdict(trace), "devices": [asdict(drift) for drift in drifts]}))
        else:
            click.echo("\n".join([*trace_lines(trace), *map(drift_line, drifts)]))
        return
    needed = memory(bundle, n_ctx, "q8_0" if kv_type == "q8_0" else "f16")
    if as_json:
        click.echo(json.dumps({**bundle.manifest.to_json(), "memory": asdict(needed)}, ensure_ascii=False))
        return
    click.echo("\n".join(tree(bundle)))
    click.echo(memory_line(needed, available_bytes()))
    if check:
        click.echo("SHA-256 of both files: as recorded")


def _save(picture: Image.Image, path: Path) -> None:
    """Write a PNG; an older file is replaced once it is whole. Raises InputError."""
    try:
        with atomic_write(path) as part:
            picture.save(part, format="PNG")
    except OSError as error:
        raise InputError(f"--save {path}: cannot be written ({error.strerror or error})") from error

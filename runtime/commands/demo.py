"""`pocketllava demo`: the model in the package, converted and asked about a drawn picture."""

from __future__ import annotations

from typing import Any

import click

from pocketllava.commands.common import Place, image_argument, load_options, quiet_option, stream


@click.command()
@click.option("--image", metavar="IMAGE", type=Place(), help="Ask about this picture instead of a drawn one.")
@load_options
@quiet_option("Print questions and answers alone.")
def demo(image: str | None, quiet: bool, load: dict[str, Any]) -> None:
    """Try it all: convert the small model in the package, draw a picture, ask five questions about it.

    Keeps the bundle and the picture in your cache folder. Works without a network.
    """
    from pocketllava import Llava, Message
    from pocketllava.models.demo.picture import QUESTIONS, drawn_picture
    from pocketllava.names import demo_bundle

    bundle = demo_bundle()
    source = image or str(drawn_picture())
    picture = image_argument(source)
    if not quiet:
        click.echo(f"model: {bundle.folder}", err=True)
        click.echo(f"picture: {source}", err=True)
    with Llava.load(bundle.folder, **load) as llava:
        for question in QUESTIONS:
            click.echo(f"> {question}")
            stream(llava, [Message("user", question, (picture,))], quiet=quiet)

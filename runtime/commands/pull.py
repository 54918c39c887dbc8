"""`pocketllava pull`: a model of the hub into the store."""

from __future__ import annotations

import click

from pocketllava.commands.common import OneOf, Text, quiet_option
from pocketllava.commands.progress import mmproj_types, progress_bar
from pocketllava.models.plan_text import size


@click.command()
@click.argument("source", type=Text("a hub id"))
@click.option(
    "--quant", metavar="TYPE", type=Text("a type"), help="Type of the text model  [default: Q4_K_M]."
)
@click.option(
    "--mmproj-type", "mmproj", type=OneOf(mmproj_types), help="Type of the vision tower  [default: F16]."
)
@click.option("--as", "name", metavar="NAME", type=Text("a name"), help="Its name in the store.")
@click.option("--keep", is_flag=True, help="Keep a checkpoint's own files, in the model's folder.")
@quiet_option("No progress bar.")
def pull(
    source: str, quant: str | None, mmproj: str | None, name: str | None, keep: bool, quiet: bool
) -> None:
    """Download a model into the store; a checkpoint is converted.

    SOURCE is a hub id, owner/name or hf://owner/name@revision; owner/name:Q4_K_M says the type. A run that was
    stopped goes on where it was. HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE are honored, POCKETLLAVA_HOME is the store.

    \b
    pocketllava pull llava-hf/llava-1.5-7b-hf
    pocketllava pull second-state/Llava-v1.5-7B-GGUF:Q5_K_M --as llava
    """
    from pocketllava.download import pull as download

    with progress_bar(quiet) as progress:
        pulled = download(source, quant=quant, mmproj=mmproj, name=name, keep=keep, progress=progress)
    for file in pulled.files if not quiet else ():
        if file.name.endswith(".gguf"):
            click.echo(f"{file.name}  {size(file.bytes)}, SHA-256 as the hub names it", err=True)
    if not quiet and not pulled.fresh:
        click.echo("is in the store already, from the same commit", err=True)
    click.echo(pulled.name)

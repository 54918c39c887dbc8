"""`pocketllava quantize`: a bundle of floats to a bundle of another type, or to several."""

from __future__ import annotations

import click

from pocketllava.commands.common import OneOf, Place, quiet_option, setting_option
from pocketllava.commands.completion import Model
from pocketllava.commands.progress import (
    imatrix_option,
    mmproj_types,
    progress_bar,
    show_bundles,
    targets,
    text_types,
    threads_option,
)
from pocketllava.types import LoadOptions


@click.command()
@click.argument("bundle", type=Model())
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="DIR",
    type=Place(),
    help="Folder to make; of several --quant DIR/TYPE, or as {quant} says.",
)
@click.option(
    "--quant",
    "quants",
    required=True,
    multiple=True,
    type=OneOf(text_types),
    help="Type of the text model; may be repeated.",
)
@click.option(
    "--mmproj",
    type=OneOf(mmproj_types),
    help="Type of the vision tower: F32, F16, BF16, Q8_0 [default: copied].",
)
@click.option(
    "--mmproj-file",
    metavar="FILE",
    type=Place(),
    help="Vision part of a GGUF text model [default: beside it].",
)
@setting_option(LoadOptions, "template")
@setting_option(LoadOptions, "pad")
@imatrix_option
@threads_option
@click.option("--force", is_flag=True, help="Replace the bundle that is there, once the new one is whole.")
@click.option("--resume", is_flag=True, help="Go on after the last whole tensor of a run that was stopped.")
@quiet_option("No progress bar, no summary.")
def quantize(
    bundle: str,
    out: str,
    quants: tuple[str, ...],
    mmproj: str | None,
    mmproj_file: str | None,
    template: str | None,
    pad: bool | None,
    imatrix: str | None,
    threads: int | None,
    force: bool,
    resume: bool,
    quiet: bool,
) -> None:
    """Make bundles of other types from an F32, F16 or BF16 bundle, without its checkpoint.

    BUNDLE may be a GGUF text model of floats, as it lies, too; what is assumed of it is printed.

    An F32 bundle gives what converting the checkpoint gives; so does a BF16 bundle of a BF16 checkpoint, or
    an F16 one of an F16 checkpoint. Other bundles of F16 and BF16 have been rounded once already.
    """
    from pocketllava.convert import requantize
    from pocketllava.names import open_bundle

    with progress_bar(quiet) as progress:
        bundles = requantize(
            open_bundle(bundle, mmproj=mmproj_file, template=template, pad=pad),
            targets(out, quants),
            mmproj=mmproj,
            imatrix=imatrix,
            force=force,
            threads=threads,
            progress=progress,
            resume=resume,
        )
    if not quiet:
        show_bundles(bundles)

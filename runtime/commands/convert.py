"""`pocketllava convert`: a checkpoint to a bundle, or to one a type."""

from __future__ import annotations

import click

from pocketllava.commands.common import OneOf, Place, Text, quiet_option, refuse
from pocketllava.commands.progress import (
    imatrix_option,
    mmproj_types,
    progress_bar,
    show_bundles,
    targets,
    text_types,
    threads_option,
)
from pocketllava.commands.show import plan_lines
from pocketllava.models.files import expanded

CONVERTING = ("quants", "mmproj", "imatrix", "revision", "vision_tower", "threads", "resume")


@click.command()
@click.argument("source", required=False, type=Place())
@click.option(
    "-o",
    "--out",
    metavar="DIR",
    type=Place(),
    help="Folder to make: model.gguf, mmproj.gguf, bundle.json; of several --quant DIR/TYPE, or as {quant} says."
    " With --repair, the file to make.",
)
@click.option(
    "--repair",
    "broken",
    metavar="FOLDER|FILE",
    type=Place(),
    help="Instead of SOURCE: an mmproj to put right, as NAME-repaired.gguf; with --force in its place.",
)
@click.option(
    "--quant",
    "quants",
    default=("Q4_K_M",),
    show_default=True,
    multiple=True,
    type=OneOf(text_types),
    help="Type of the text model; several make a bundle each from one pass over the checkpoint.",
)
@click.option(
    "--mmproj",
    default="F16",
    show_default=True,
    type=OneOf(mmproj_types),
    help="Type of the vision tower: F32, F16, BF16, Q8_0 (features about 3 % off, single tokens up to 8 %).",
)
@imatrix_option
@click.option(
    "--revision",
    metavar="REV",
    type=Text("a branch, tag or commit"),
    help="Branch, tag or commit of a hub id.",
)
@click.option(
    "--vision-tower",
    metavar="FOLDER",
    type=Place(),
    help="CLIP model (folder or hub id) for a checkpoint in the original LLaVA format [default: the one it names].",
)
@threads_option
@click.option("--force", is_flag=True, help="Replace the bundle that is there, once the new one is whole.")
@click.option("--resume", is_flag=True, help="Go on after the last whole tensor of a run that was stopped.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and stop.")
@quiet_option("No progress bar, no summary.")
def convert(
    source: str | None,
    out: str | None,
    broken: str | None,
    quants: tuple[str, ...],
    mmproj: str,
    imatrix: str | None,
    revision: str | None,
    vision_tower: str | None,
    threads: int | None,
    force: bool,
    resume: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Convert a LLaVA-1.5 or 1.6 checkpoint (a folder or a Hugging Face id) into two llama.cpp files.

    TYPE for --quant: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q3_K_L Q3_K_M Q3_K_S Q2_K
    Q5_0 Q5_1 Q4_0 Q4_1 IQ4_NL IQ4_XS; with --imatrix IQ3_M IQ3_S IQ3_XS IQ3_XXS IQ2_M IQ2_S IQ2_XS IQ2_XXS.
    """
    from pocketllava.convert.pipeline import execute_all, plan_types
    from pocketllava.convert.write.staging import check_target
    from pocketllava.llamacpp.devices import cores

    if broken is not None:
        if source is not None:
            raise click.UsageError("--repair takes the place of SOURCE; give one of them")
        refuse("with --repair", *CONVERTING)
        if dry_run:
            refuse("with --dry-run", "out", "force")
        from pocketllava.commands.repair import repair_file

        repair_file(broken, out, force=force, dry_run=dry_run, quiet=quiet)
        return
    if source is None or out is None:
        raise click.UsageError("Missing argument 'SOURCE'." if source is None else "Missing option '--out'.")
    if dry_run:
        refuse("with --dry-run", "force", "resume")
    if expanded(source).is_dir():
        refuse("with a folder; it is a hub id's branch, tag or commit", "revision")
    elif quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    types = targets(out, quants)
    for target in () if dry_run or resume else types:
        check_target(target, force)
    plans = plan_types(
        source,
        list(types.values()),
        mmproj=mmproj,
        revision=revision,
        imatrix=imatrix,
        vision_tower=vision_tower,
    )
    planned = dict(zip(types, plans, strict=True))
    if not quiet:
        for remark in plans[0].remarks:
            click.echo(f"note: {remark}", err=True)
    if dry_run:
        for target, each in planned.items():
            click.echo("\n".join(plan_lines(each, str(target), threads or cores())))
        return
    with progress_bar(quiet) as progress:
        bundles = execute_all(
            planned, force=force, threads=threads or cores(), progress=progress, resume=resume
        )
    if not quiet:
        show_bundles(bundles)

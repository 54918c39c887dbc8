"""`pocketllava convert`: a checkpoint to a bundle, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from pocketllava.show import plan_lines, size


@click.command()
@click.argument("source")
@click.option(
    "--out", required=True, metavar="DIR", help="Folder to make: model.gguf, mmproj.gguf, bundle.json."
)
@click.option("--quant", default="Q4_K_M", show_default=True, metavar="TYPE", help="Type of the text model.")
@click.option(
    "--mmproj",
    default="F16",
    show_default=True,
    metavar="TYPE",
    help="Type of the vision tower: F32, F16, BF16, Q8_0.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option(
    "--vision-tower",
    metavar="FOLDER",
    help="CLIP model (folder or hub id) for a checkpoint in the original LLaVA format [default: the one it names].",
)
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads that quantise [default: physical cores]."
)
@click.option("--force", is_flag=True, help="Replace the bundle that is there, once the new one is whole.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and stop.")
@click.option("--quiet", is_flag=True, help="No progress bar, no summary.")
def convert(
    source: str,
    out: str,
    quant: str,
    mmproj: str,
    revision: str | None,
    vision_tower: str | None,
    threads: int | None,
    force: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Convert a LLaVA-1.5 checkpoint (a folder or a Hugging Face id) into two llama.cpp files.

    TYPE for --quant: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q3_K_L Q3_K_M Q3_K_S Q2_K
    Q5_0 Q5_1 Q4_0 Q4_1 IQ4_NL IQ4_XS.
    """
    from pathlib import Path

    from pocketllava.backend import cores
    from pocketllava.convert import execute, plan

    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    planned = plan(source, quant=quant, mmproj=mmproj, revision=revision, vision_tower=vision_tower)
    if dry_run:
        click.echo("\n".join(plan_lines(planned, out, threads or cores())))
        return
    with _progress_bar(quiet) as progress:
        bundle = execute(
            planned, Path(out).expanduser(), force=force, threads=threads or cores(), progress=progress
        )
    if not quiet:
        sizes = {name: entry["bytes"] for name, entry in bundle.manifest["files"].items()}
        click.echo(", ".join(f"{bundle.folder / n} {size(b)}" for n, b in sizes.items()), err=True)


@contextmanager
def _progress_bar(quiet: bool) -> Iterator[Any]:
    """A callback that draws bytes, rate and time left; nothing when quiet or not on a terminal."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def close() -> None:
        for bar in bars.values():
            bar.close()
        bars.clear()

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            close()
            disable = True if quiet else None  # None: only on a terminal
            bars[stage] = tqdm(total=total, desc=stage, unit="B", unit_scale=True, disable=disable)
        if not bars[stage].disable:
            bars[stage].update(done - bars[stage].n)

    try:
        yield progress
    finally:
        close()

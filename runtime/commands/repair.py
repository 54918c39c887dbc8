"""`pocketllava convert --repair`: an mmproj's faults, the repaired file, and the change of its features."""

from __future__ import annotations

from pathlib import Path

import click

from pocketllava.models.files import expanded
from pocketllava.models.manifest import MANIFEST


def repair_file(broken: str, out: str | None, *, force: bool, dry_run: bool, quiet: bool) -> None:
    """Examine, repair and measure; faults go to stdout. Raises ConvertError."""
    from pocketllava.convert.repair import examine, find_mmproj, repair

    source = find_mmproj(expanded(broken))
    examined = examine(source)
    for fault in examined.faults:
        click.echo(f"{source.name}: {fault}")
    if not examined.faults:
        click.echo(f"{source}: nothing to repair")
    if dry_run:
        return
    if not examined.faults:
        _join(source, quiet)
        return
    beside = source if force else source.with_name(f"{source.stem}-repaired.gguf")
    target = expanded(out) if out is not None else beside
    lines: list[str] = []
    repair(
        examined, target, force=force, look=None if quiet else lambda new: lines.append(_moved(source, new))
    )
    click.echo("".join(f"{line}\n" for line in lines), nl=False)
    if not quiet:
        click.echo(f"{target}: written, tensor data unchanged", err=True)
    _join(target, quiet)


def _join(mmproj: Path, quiet: bool) -> None:
    """Write bundle.json where a text model lies beside the mmproj, so that both can be asked at once."""
    from pocketllava.convert.pair import join, text_model_beside
    from pocketllava.convert.repair import in_bundle

    model = text_model_beside(mmproj)
    if model is None or in_bundle(mmproj):
        return
    bundle = join(model, mmproj)
    if not quiet:
        pads = "padded to a square" if bundle.preprocessing.pad_to_square else "cropped"
        click.echo(f"{bundle.folder / MANIFEST}: written for {model.name}; pictures are {pads}", err=True)


def _moved(before: Path, after: Path) -> str:
    from pocketllava.errors import BackendError
    from pocketllava.measure.feature_drift import features_move

    try:
        difference = features_move(before, after)
    except BackendError as error:
        return f"how far the features move is not known: {error}"
    if difference is None:
        return "features: llama.cpp refuses the file as it was, and computes them from the repaired one"
    return f"features of a drawn picture: moved by {difference:.2g} of their norm"

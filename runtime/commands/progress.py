"""What converting commands share: options, names of types and folders, a progress bar, the list of new files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import Place
from pocketllava.models.files import expanded
from pocketllava.models.plan_text import size

if TYPE_CHECKING:
    from pocketllava.models import Bundle

PLACEHOLDER = "{quant}"

imatrix_option = click.option(
    "--imatrix",
    metavar="FILE",
    type=Place(),
    help="Importance matrix (see `pocketllava imatrix`); IQ2 and IQ3 need one.",
)
threads_option = click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Threads that quantize [default: physical cores].",
)


def text_types() -> Iterable[str]:
    """Types of a text model, by name."""
    from pocketllava.convert.plan.quantize import TEXT_TYPES

    return TEXT_TYPES


def mmproj_types() -> Iterable[str]:
    """Types of a vision tower, by name."""
    from pocketllava.convert.plan.quantize import MMPROJ_TYPES

    return MMPROJ_TYPES


def targets(out: str, quants: Sequence[str]) -> dict[Path, str]:
    """Each bundle's folder and type: `out` itself for one type; for several, `out` with {quant} replaced by the
    type, or a folder named after the type in it."""
    names = list(dict.fromkeys(quant.upper() for quant in quants))
    if len(names) == 1:
        return {expanded(out): names[0]}
    pattern = out if PLACEHOLDER in out else str(Path(out) / PLACEHOLDER)
    return {expanded(pattern.replace(PLACEHOLDER, name)): name for name in names}


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Any]:
    """A callback that draws bytes, rate, time left and the tensor; nothing when quiet or not on a terminal."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def close() -> None:
        for bar in bars.values():
            bar.close()
        bars.clear()

    def progress(stage: str, done: int, total: int, name: str) -> None:
        if stage not in bars:
            close()
            disable = True if quiet else None  # None: only on a terminal
            # an earlier run's bytes count as done, and not towards the rate
            bars[stage] = tqdm(
                total=total, initial=done, desc=stage, unit="B", unit_scale=True, disable=disable
            )
        if not bars[stage].disable:
            bars[stage].set_postfix_str(name, refresh=False)
            bars[stage].update(done - bars[stage].n)

    try:
        yield progress
    finally:
        close()


def show_bundles(bundles: Sequence[Bundle]) -> None:
    """List the files of new bundles on stderr, a line a bundle."""
    for bundle in bundles:
        sizes = {name: record.bytes for name, record in bundle.manifest.files.items()}
        click.echo(", ".join(f"{bundle.folder / n} {size(b)}" for n, b in sizes.items()), err=True)

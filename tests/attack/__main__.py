"""Every campaign, one after the other, and their counts as the table of docs/attacks.md.

    PYTHONPATH=$PWD/tests python -m attack FOLDER [--seed N] [--share X] [CAMPAIGN]...

A share of 1 takes about 15 minutes on two cores (`make attack`). Inputs that ended wrongly stay in FOLDER/CAMPAIGN, which
is emptied first. Exits 1 if there are any.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import damage
from attack import bodies, files, gguf_files, interrupts, isolated, schemas, serving, streams, templates
from attack.counts import Counts

Campaign = Callable[[int, int, Path], Counts]
COLUMNS = ("cases", "refused", "accepted", "crashes", "hangs", "tracebacks", "wrong")


def _target(name: str, seed: int, cases: int, folder: Path) -> Counts:
    return files.run([name], seed, cases, folder)[name]


CAMPAIGNS: dict[str, tuple[Campaign, int]] = {
    "GGUF files": (gguf_files.run, 8000),
    "chat templates and tokenizers": (templates.run, 1200),
    "checkpoints": (damage.campaign, 100),
    **{name: (partial(_target, name), 1500) for name in files.TARGETS},
    "JSON schemas": (schemas.run, 4000),
    "bodies of requests": (bodies.run, 5000),
    "commands in odd places": (streams.run, 60),
    "interrupts": (interrupts.run, 60),
    **isolated.CAMPAIGNS,
    **serving.CAMPAIGNS,
}


def main() -> None:
    """Run, print the table and what failed."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("campaigns", nargs="*", default=list(CAMPAIGNS))
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--share", type=float, default=1.0)
    a = ap.parse_intermixed_args()
    print(f"| class | {' | '.join(COLUMNS)} | s |\n|---{'|---' * len(COLUMNS)}|---|")
    failures: list[str] = []
    for name in a.campaigns:
        campaign, cases = CAMPAIGNS[name]
        folder = a.folder / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.perf_counter()
        counts = campaign(a.seed, max(1, round(cases * a.share)), folder)
        figures = " | ".join(str(getattr(counts, column)) for column in COLUMNS)
        print(f"| {name} | {figures} | {time.perf_counter() - start:.0f} |", flush=True)
        failures += [f"{name}: {failure}" for failure in counts.failures]
    print("\n".join(["", *failures]) if failures else "\nno failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

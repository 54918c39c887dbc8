"""Every campaign, one after the other, and their counts as the table of docs/attacks.md.

    PYTHONPATH=$PWD/tests python -m attack FOLDER [--seed N] [--share X] [--long] [CAMPAIGN]...

With the quick counts and a share of 1 all of them take about ten minutes on one core, and `make attack` a quarter of
an hour on two; --long, or LONG=1 in the environment, takes the counts that the issues ask for, in hours. Inputs that
ended wrongly stay in FOLDER/CAMPAIGN, which is emptied first. Exits 1 if there are any.
"""

from __future__ import annotations

import argparse
import os
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
COLUMNS = ("cases", "refused", "accepted", "crashes", "hangs", "tracebacks", "leaks", "wrong")


def _target(name: str, seed: int, cases: int, folder: Path) -> Counts:
    return files.run([name], seed, cases, folder)[name]


CAMPAIGNS: dict[str, tuple[Campaign, int, int]] = {  # what runs, quick count, long count
    "GGUF files": (gguf_files.run, 4000, 20_000),
    "chat templates and tokenizers": (templates.run, 600, 5000),
    "checkpoints": (damage.campaign, 100, 1000),
    **{name: (partial(_target, name), 1500, 5000) for name in files.TARGETS},
    "JSON schemas": (schemas.run, 2000, 20_000),
    "bodies of requests": (bodies.run, 2500, 5000),
    "commands in odd places": (streams.run, 30, 100),
    "interrupts": (interrupts.run, 60, 504),
    "cancelled calls": (isolated.cancels, 20, 50),  # for each of four phases, twice
    "calls in a row": (isolated.calls, 500, 3000),
    "disconnects": (serving.disconnects, 10, 200),  # for each of five phases, twice
    "kills": (serving.kills, 30, 100),
    "aborts": (serving.aborts, 10, 20),
    "orphans": (serving.orphans, 5, 20),
    "slow sockets": (serving.slow_sockets, 20, 20),
    "names": (serving.names, 1, 1),
    "mixed load": (serving.mixed_load, 1, 60),  # minutes
}


def main() -> None:
    """Run, print the table and what failed."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("campaigns", nargs="*", default=list(CAMPAIGNS))
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--share", type=float, default=1.0)
    ap.add_argument("--long", action="store_true", default=bool(os.environ.get("LONG")))
    a = ap.parse_intermixed_args()
    top = a.folder.absolute()  # children run in other folders
    print(f"| class | {' | '.join(COLUMNS)} | s |\n|---{'|---' * len(COLUMNS)}|---|")
    failures: list[str] = []
    for name in a.campaigns:
        campaign, *cases = CAMPAIGNS[name]
        folder = top / name.replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.perf_counter()
        counts = campaign(a.seed, max(1, round(cases[a.long] * a.share)), folder)
        figures = " | ".join(str(getattr(counts, column)) for column in COLUMNS)
        print(f"| {name} | {figures} | {time.perf_counter() - start:.0f} |", flush=True)
        failures += [f"{name}: {failure}" for failure in counts.failures]
    print("\n".join(["", *failures]) if failures else "\nno failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()

"""Damaged files and lines, drawn from a seed, one campaign a reader.

    PYTHONPATH=tests python tests/attack/files.py SEED CASES FOLDER [TARGET]...

A case is refused in one line or accepted, within two seconds, in a child process; everything else is a failure, whose
input stays in FOLDER and belongs into tests/corpus/TARGET. GGUF files and chat templates have campaigns of their own.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from attack import images, texts, weights
from attack.child import Target, campaign, serve
from attack.counts import Counts

TARGETS: dict[str, Target] = images.TARGETS | texts.TARGETS | weights.TARGETS
CORPUS = Path(__file__).parent.parent / "corpus"


def run_target(name: str, seed: int, cases: int, folder: Path) -> Counts:
    """One reader's campaign."""
    return campaign(Path(__file__), name, seed, cases, folder / name.replace(" ", "-"))


def run(seed: int, cases: int, folder: Path) -> Counts:
    """All of them, with so many cases each."""
    total = Counts()
    for name in TARGETS:
        counts = run_target(name, seed, cases, folder)
        for key, value in asdict(counts).items():
            setattr(total, key, getattr(total, key) + value)
    return total


def main() -> None:
    """The command line of this file's first lines, or a child's loop."""
    if sys.argv[1:2] == ["--child"]:
        name, seed, first, last, folder = sys.argv[2:]
        serve(TARGETS[name], int(seed), iter(range(int(first), int(last))), Path(folder))
        return
    seed, cases, folder, *names = sys.argv[1:]
    for name in names or TARGETS:
        print(
            name,
            json.dumps(asdict(run_target(name, int(seed), int(cases), Path(folder))), indent=1),
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Damaged files and lines, drawn from a seed, one campaign a reader.

    PYTHONPATH=tests python tests/attack/files.py SEED CASES FOLDER [TARGET]...

A case is refused in one line or accepted, within two seconds, in a child process; everything else is a failure, whose
input stays in FOLDER and belongs into tests/corpus/TARGET. GGUF files and chat templates have campaigns of their own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from attack import images, texts, weights
from attack.child import Target, campaign, serve
from attack.counts import Counts

TARGETS: dict[str, Target] = images.TARGETS | texts.TARGETS | weights.TARGETS
CORPUS = Path(__file__).parent.parent / "corpus"


def run(names: Sequence[str], seed: int, cases: int, folder: Path) -> dict[str, Counts]:
    """These readers' campaigns, with so many cases each."""
    return campaign(Path(__file__), names, seed, cases, folder)


def main() -> None:
    """The command line of this file's first lines, or a child's loop."""
    if sys.argv[1:2] == ["--child"]:
        seed, cases, first, folder, *names = sys.argv[2:]
        serve({name: TARGETS[name] for name in names}, int(seed), int(cases), int(first), Path(folder))
        return
    seed, cases, folder, *names = sys.argv[1:]
    for name, counts in run(names or list(TARGETS), int(seed), int(cases), Path(folder)).items():
        print(name, json.dumps(asdict(counts), indent=1), flush=True)


if __name__ == "__main__":
    main()

"""What the benchmarks share: arguments, the machine in one line, two sides in turn, a picture as servers take it."""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketllava.measure.speed import machine

PHOTO = Path(__file__).parent.parent / "tests" / "photo.jpg"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows a bundle, --image and --runs. description: the benchmark's docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--image", default=str(PHOTO))
    parser.add_argument("-n", "--runs", type=int, default=3)
    return parser


def about(**facts: Any) -> str:
    """Machine, versions and what else the figures depend on, in one line."""
    return "; ".join(f"{name}: {value}" for name, value in {**machine(), **facts}.items())


def compare(
    parser: argparse.ArgumentParser,
    script: str,
    measure: Callable[[argparse.Namespace], dict[str, float]],
    sides: tuple[str, str],
    rows: dict[str, str],
    title: str,
) -> None:
    """Print a table of two sides' medians, a row for each name that `measure` gives values under.

    Each run is a process of its own, this script with --side SIDE; the sides take turns, and who begins alternates.
    """
    parser.add_argument("--side", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.side:
        print(json.dumps(measure(a)))
        return
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for n in range(a.runs):
        for side in sides[:: 1 if n % 2 == 0 else -1]:
            command = [sys.executable, script, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
            rounds[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {n + 1}, {side}: {rounds[side][-1]}", file=sys.stderr, flush=True)
    print(about(rounds=a.runs) + "\n")
    print(f"| {title} | {' | '.join(sides)} | {' / '.join(sides)} |\n|---|---|---|---|")
    for row, name in rows.items():
        one, other = (statistics.median(values[row] for values in rounds[side]) for side in sides)
        print(f"| {name} | {one:.3g} | {other:.3g} | {one / other:.3f} |")


def image_part(picture: bytes) -> dict[str, Any]:
    """A picture in a message of OpenAI's API."""
    uri = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}

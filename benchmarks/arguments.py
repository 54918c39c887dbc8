"""What the benchmarks share: arguments, the machine in one line, two sides in turn, a picture as servers take it."""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
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


def medians_in_turn(script: str, sides: tuple[str, str], runs: int) -> dict[str, dict[str, float]]:
    """By side, medians of what `script --side SIDE`, with this process's arguments, prints as JSON in its last line.

    Each run is a process of its own; the sides take turns, and who begins alternates.
    """
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for n in range(runs):
        for side in sides[:: 1 if n % 2 == 0 else -1]:
            command = [sys.executable, script, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
            rounds[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {n + 1}, {side}: {rounds[side][-1]}", file=sys.stderr, flush=True)
    return {
        side: {row: statistics.median(values[row] for values in found) for row in found[0]}
        for side, found in rounds.items()
    }


def image_part(picture: bytes) -> dict[str, Any]:
    """A picture in a message of OpenAI's API."""
    uri = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}

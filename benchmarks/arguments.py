"""What the benchmarks share: arguments for a bundle, a picture and rounds, and the line about the machine."""

from __future__ import annotations

import argparse
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

"""What the benchmarks share: arguments, the machine in one line, and a picture as servers take it."""

from __future__ import annotations

import argparse
import base64
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


def image_part(picture: bytes) -> dict[str, Any]:
    """A picture in a message of OpenAI's API."""
    uri = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
    return {"type": "image_url", "image_url": {"url": uri}}

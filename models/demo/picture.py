"""The demo's picture and questions. Knows the drawn scenes; no engine."""

from __future__ import annotations

import io
from pathlib import Path

from pocketllava.models.files import atomic_write, cache_folder

SCENE = 10_000_003  # a held-out seed
QUESTIONS = (
    "What's the content of the image?",
    "How many objects are there?",
    "What is at the center?",
    "Where is the dog?",
    "Describe the image.",
)


def drawn_picture() -> Path:
    """Draw the scene into the user's cache; returns its path."""
    from pocketllava.models.demo import scenes

    path, png = cache_folder() / "demo.png", io.BytesIO()
    scenes.scene(SCENE).draw().save(png, "png")
    if not path.is_file() or path.read_bytes() != png.getvalue():
        with atomic_write(path) as part:
            part.write_bytes(png.getvalue())
    return path

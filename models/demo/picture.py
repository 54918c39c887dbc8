"""The demo's picture and questions. Knows the drawn scenes; no engine."""

from __future__ import annotations

from pathlib import Path

from pocketllava.models.files import cache_folder

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

    path = cache_folder() / "demo.png"
    scenes.scene(SCENE).draw().save(path)
    return path

"""A small album that no model had to make: five drawn scenes with captions and features. Tests nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from pocketllava import Options
from pocketllava.album import alike
from pocketllava.album.journal import Album, Given, Picture
from pocketllava.album.prompts import questions
from pocketllava.models.demo import scenes
from pocketllava.names import open_bundle

SEED = scenes.HELD_OUT_SEEDS.start + 40
FORMATS = ("png", "jpg", "webp", "bmp", "gif")
PROMPTS = ("Describe the image.", "How many objects are there?")


def album(folder: Path, captions: tuple[str, ...], more: tuple[str, ...] = ()) -> Path:
    """Its file, beside `photos`. more: answers to a second question, of the first pictures."""
    photos, path = folder / "photos", folder / "photos.album"
    photos.mkdir()
    with Album(path, root=str(photos)) as made:
        asked = questions(open_bundle("demo"), PROMPTS, Options(), {})
        columns = [made.add_question(question) for question in asked[: 2 if more else 1]]
        for k, caption in enumerate(captions):
            name = f"{k}.{FORMATS[k % len(FORMATS)]}"
            scenes.scene(SEED + k).draw().save(photos / name)
            picture = made.add_picture(_picture(photos, name))
            for column, text in zip(columns, (caption, *more[k : k + 1]), strict=False):
                made.put(picture, column, Given(text, pixels=str(k), asked=column.prompt))
            angle = k * np.pi / 12  # each is most like its neighbors
            features = np.zeros((1, 256), np.float32)
            features[0, :2] = np.cos(angle), np.sin(angle)
            alike.put(made, str(k), columns[0].model_sha256, features)
    return path


def _picture(photos: Path, name: str) -> Picture:
    data, stat = (photos / name).read_bytes(), (photos / name).stat()
    return Picture(name, stat.st_size, stat.st_mtime_ns, hashlib.sha256(data).hexdigest())

"""A pool of training pictures on disk and the labels of their cells; numpy and Pillow only, knows nothing of models.

Pictures are drawn once, some of them worn (JPEG, 256 colors, resized): drawing costs more than a training step.
"""

import io
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketllava.models.demo import drawing, scenes, world

Bytes = NDArray[np.uint8]
KINDS = (*world.SHAPES, *world.DIGITS)
HEADS = {  # what every patch has to know about its cell, and how many values that has; 0 is an empty cell
    "shape": len(KINDS) + 1, "color": len(world.COLORS) + 1, "size": 3, "cell": 9, "background": 3,
    "rank": 5, "total": 5, "same_color": 5, "same_shape": 5,
}  # fmt: skip
WORDS = (  # what the values of each head are called, where words say it
    ("", *KINDS), ("", *world.COLORS), ("", *world.SIZES), world.PLACES, tuple(drawing.BACKGROUNDS),
    (), ("", *"1234"), ("", *"1234"), ("", *"1234"),
)  # fmt: skip


def cells(s: world.Scene) -> Bytes:
    """Labels (9 cells, len(HEADS)); rank is the place in reading order, same_* how many things share it."""
    rows = np.zeros((9, len(HEADS)), np.uint8)
    rows[:, 3], rows[:, 4], rows[:, 6] = (
        range(9),
        list(drawing.BACKGROUNDS).index(s.background),
        len(s.things),
    )
    for rank, t in enumerate(s.things, 1):
        color, shape = sum(o.color == t.color for o in s.things), sum(o.shape == t.shape for o in s.things)
        rows[t.cell, :3] = (
            KINDS.index(t.shape) + 1,
            world.COLORS.index(t.color) + 1,
            world.SIZES.index(t.size) + 1,
        )
        rows[t.cell, [5, 7, 8]] = rank, color, shape
    return rows


def worn(image: Image.Image, rng: random.Random) -> Image.Image:
    """Augment a picture: mostly unchanged, else recompressed, reduced to 256 colors or resized."""
    way = rng.random()
    if way < 0.15:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=40 + int(55 * rng.random()))
        return Image.open(file).convert("RGB")
    if way < 0.2:
        return image.convert("P", palette=Image.Palette.ADAPTIVE).convert("RGB")
    if way < 0.3:
        side = 168 + int(400 * rng.random())
        return image.resize((side, side), Image.Resampling.BICUBIC).resize(
            image.size, Image.Resampling.BICUBIC
        )
    return image


def draw(path: Path, n: int, progress: Callable[[int], None]) -> None:
    """Write the pictures of seeds 0..n-1 as raw (n, 336, 336, 3) bytes; resumes after the last complete one."""
    nbytes = drawing.SIDE**2 * 3
    with path.open("ab") as file:
        done = file.tell() // nbytes
        file.truncate(done * nbytes)
        for seed in scenes.TRAIN_SEEDS[done:n]:
            picture = worn(scenes.scene(seed).draw(), random.Random(seed))
            file.write(picture.tobytes())
            if seed % 1000 == 999:
                progress(seed + 1)


def read(path: Path, which: Iterable[int]) -> Bytes:
    """The pictures of these seeds (n, 336, 336, 3)."""
    side, seeds = drawing.SIDE, list(which)
    nbytes = side * side * 3
    rows = [np.fromfile(path, np.uint8, nbytes, offset=seed * nbytes) for seed in seeds]
    return np.stack(rows).reshape(-1, side, side, 3)


def shuffled(pictures: Bytes, labels: Bytes, rng: np.random.Generator) -> tuple[Bytes, Bytes]:
    """Each picture's nine cells in another order, and their labels (n, 9, len(HEADS)) with them."""
    n, side = len(pictures), world.CELL
    order = np.argsort(rng.random((n, 9)), axis=1)
    tiles = pictures.reshape(n, 3, side, 3, side, 3).swapaxes(2, 3).reshape(n, 9, side, side, 3)
    moved = np.take_along_axis(labels, order[..., None], axis=1)
    seen = moved[..., 0] > 0
    moved[..., 3], moved[..., 5] = np.arange(9), np.cumsum(seen, axis=1) * seen
    tiles = tiles[np.arange(n)[:, None], order].reshape(n, 3, 3, side, side, 3).swapaxes(2, 3)
    return tiles.reshape(pictures.shape), moved

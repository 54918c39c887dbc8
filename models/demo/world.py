"""What a drawn scene holds, from a seed to pixels; knows nothing of questions, of torch or of any model.

A scene has one to four things in the cells of a 3 x 3 grid; no two share both color and shape,
and digits are always large.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketllava.models.demo import drawing

T = TypeVar("T")

COLORS = tuple(drawing.PALETTE)
SHAPES = tuple(drawing.SHAPES)
DIGITS = tuple(drawing.STROKES)
SIZES = ("small", "large")
RADII = {"small": 28, "large": 47}  # pixels; a cell is 112 wide
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CELL = drawing.SIDE // 3


@dataclass(frozen=True)
class Thing:
    """One drawn object; cell counts 0..8 in reading order, as PLACES does."""

    shape: str
    color: str
    size: str
    cell: int

    @property
    def noun(self) -> str:
        return f"number {self.shape}" if self.shape in DIGITS else self.shape

    @property
    def name(self) -> str:
        return f"{self.color} {self.noun}"

    @property
    def place(self) -> str:
        return PLACES[self.cell]


@dataclass(frozen=True)
class Scene:
    """What a picture shows; things are in reading order."""

    seed: int
    background: str
    texture: str
    things: tuple[Thing, ...]

    def draw(self) -> Image.Image:
        """The picture, 336 x 336 RGB; the same for the same seed."""
        return Image.fromarray(self.pixels())

    def pixels(self) -> NDArray[np.uint8]:
        """The picture as (336, 336, 3)."""
        rng = random.Random(self.seed * 2 + 1)
        canvas = drawing.background(self.background, self.texture, rng)
        for thing in self.things:
            radius = RADII[thing.size] * (0.92 + 0.16 * rng.random())
            slack = (CELL / 2 - radius - 2) * 0.7
            center = [
                CELL * (k + 0.5) + slack * (2 * rng.random() - 1) for k in (thing.cell % 3, thing.cell // 3)
            ]
            drawing.paint(canvas, thing.shape, thing.color, (center[0], center[1]), radius, rng)
        return (canvas + np.float32(0.5)).astype(np.uint8)


def pick(rng: random.Random, values: Sequence[T]) -> T:
    """One value; uses random() only, whose sequence Python promises to keep."""
    return values[int(rng.random() * len(values))]


def scene(seed: int) -> Scene:
    """The scene of a seed."""
    rng = random.Random(seed * 2)
    count = pick(rng, (1, 2, 2, 3, 3, 4, 4))
    cells = sorted(sorted(range(9), key=lambda _: rng.random())[:count])
    things: list[Thing] = []
    while len(things) < count:
        thing = _thing(rng, cells[len(things)], things)
        twin = any(t.name == thing.name for t in things)
        if not twin and sum(t.shape in DIGITS for t in [*things, thing]) <= 2:
            things.append(thing)
    return Scene(seed, pick(rng, tuple(drawing.BACKGROUNDS)), pick(rng, drawing.TEXTURES), tuple(things))


def _thing(rng: random.Random, cell: int, before: list[Thing]) -> Thing:
    shape = pick(rng, DIGITS) if rng.random() < 0.25 else pick(rng, SHAPES)
    color = pick(rng, COLORS)
    if before and rng.random() < 0.3:
        shape = pick(rng, before).shape
    elif before and rng.random() < 0.3:
        color = pick(rng, before).color
    size = pick(rng, SIZES)
    return Thing(shape, color, "large" if shape in DIGITS else size, cell)

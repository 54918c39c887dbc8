"""Pixels of a drawn scene: shapes and digits as signed distances in numpy; knows nothing of questions, seeds or torch.

No font and no drawing library takes part, so a seed gives the same picture everywhere.
"""

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SIDE = 336  # pixels, what LLaVA-1.5's processor makes of every picture
PALETTE = {
    "red": (218, 38, 38),
    "orange": (246, 134, 20),
    "yellow": (246, 214, 30),
    "green": (36, 156, 62),
    "blue": (38, 92, 222),
    "purple": (140, 50, 190),
}
BACKGROUNDS = {"white": 246, "gray": 150, "black": 26}  # gray levels
TEXTURES = ("plain", "grain", "clouds")


def _circle(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - np.float32(0.95)


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.85)


def _triangle(u: Array, v: Array) -> Array:
    return np.asarray(np.maximum(v - 0.8, (np.abs(u) * 1.75 - 0.95 - v) / 2.0156), np.float32)


def _cross(u: Array, v: Array) -> Array:
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(a, b) - 0.32, np.maximum(a, b) - 0.92)


def _heart(u: Array, v: Array) -> Array:
    lobes = np.hypot(np.abs(u) - 0.4, v + 0.25) - 0.566
    return np.asarray(np.minimum(lobes, (np.abs(u) + np.abs(v - 0.15) - 0.8) * 0.7071), np.float32)


def _star(u: Array, v: Array) -> Array:
    turn = 2 * np.pi / 5
    angle = np.abs(np.remainder(np.arctan2(u, -v) + turn / 2, turn) - turn / 2)
    x, y = np.hypot(u, v) * np.sin(angle), np.hypot(u, v) * np.cos(angle)
    nx, ny = 1 - 0.45 * np.cos(np.pi / 5), 0.45 * np.sin(np.pi / 5)
    return np.asarray((x * nx + (y - 1) * ny) / np.hypot(nx, ny), np.float32)  # tip (0, 1) to notch


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
}
STROKES: dict[str, list[tuple[float, float]]] = {  # u right, v down, one pen line each
    "0": [
        (0, -0.8),
        (0.42, -0.55),
        (0.5, 0),
        (0.42, 0.55),
        (0, 0.8),
        (-0.42, 0.55),
        (-0.5, 0),
        (-0.42, -0.55),
        (0, -0.8),
    ],
    "1": [(-0.32, -0.45), (0.08, -0.8), (0.08, 0.8)],
    "2": [
        (-0.45, -0.45),
        (-0.2, -0.78),
        (0.25, -0.75),
        (0.45, -0.4),
        (0.3, -0.02),
        (-0.48, 0.78),
        (0.52, 0.78),
    ],
    "3": [
        (-0.42, -0.65),
        (0, -0.82),
        (0.42, -0.5),
        (0.3, -0.15),
        (-0.08, -0.02),
        (0.35, 0.15),
        (0.46, 0.48),
        (0, 0.82),
        (-0.46, 0.62),
    ],
    "4": [(0.22, 0.82), (0.22, -0.8), (-0.52, 0.28), (0.56, 0.28)],
    "5": [
        (0.45, -0.78),
        (-0.38, -0.78),
        (-0.42, -0.1),
        (0.1, -0.2),
        (0.48, 0.2),
        (0.3, 0.68),
        (-0.1, 0.82),
        (-0.48, 0.62),
    ],
    "6": [
        (0.36, -0.78),
        (-0.2, -0.5),
        (-0.48, 0.2),
        (-0.3, 0.7),
        (0.1, 0.8),
        (0.46, 0.4),
        (0.2, 0.02),
        (-0.2, 0.1),
        (-0.44, 0.35),
    ],
    "7": [(-0.5, -0.78), (0.5, -0.78), (-0.1, 0.82)],
    "8": [
        (0, -0.02),
        (-0.38, -0.4),
        (0, -0.8),
        (0.38, -0.4),
        (0, -0.02),
        (-0.46, 0.42),
        (0, 0.82),
        (0.46, 0.42),
        (0, -0.02),
    ],
    "9": [
        (0.44, -0.35),
        (0.1, -0.02),
        (-0.34, -0.15),
        (-0.44, -0.5),
        (-0.1, -0.8),
        (0.3, -0.72),
        (0.46, -0.3),
        (0.3, 0.8),
    ],
}


def _pen(u: Array, v: Array, points: list[tuple[float, float]]) -> Array:
    """Distance to a rounded line of half width 0.14 through the points."""
    best = np.full(np.broadcast(u, v).shape, 9.0, np.float32)
    for (ax, ay), (bx, by) in pairwise(points):
        dx, dy = bx - ax, by - ay
        t = np.clip(((u - ax) * dx + (v - ay) * dy) / (dx * dx + dy * dy), 0, 1)
        np.minimum(best, np.hypot(u - ax - t * dx, v - ay - t * dy), out=best)
    return best - np.float32(0.14)


def _distance(shape: str, u: Array, v: Array, rng: random.Random) -> Array:
    if shape in SHAPES:
        return SHAPES[shape](u, v)
    slant = 0.3 * rng.random() - 0.1
    return _pen(
        u, v, [(x - slant * y + 0.06 * rng.random(), y + 0.06 * rng.random()) for x, y in STROKES[shape]]
    )


def paint(canvas: Array, shape: str, color: str, center: tuple[float, float], radius: float,
          rng: random.Random) -> None:  # fmt: skip
    """Draw one thing on canvas (SIDE, SIDE, 3) of 0..255; center (x, y) and radius in pixels."""
    x0, y0 = (int(c - radius - 2) for c in center)
    size = int(2 * radius + 6)
    line = np.arange(size, dtype=np.float32) + np.float32(0.5)
    u, v = ((line + x0 - center[0]) / radius)[None, :], ((line + y0 - center[1]) / radius)[:, None]
    d = _distance(shape, u.astype(np.float32), v.astype(np.float32), rng) * np.float32(radius)  # pixels
    alpha = np.clip(0.5 - d, 0, 1)[..., None]
    light = (
        1.06 - 0.08 * v - 0.16 * np.clip(d + 3.0, 0, 1) * (shape in SHAPES)
    )  # lit from above, a darker rim
    ink = np.array(PALETTE[color], np.float32) + np.float32(12 * rng.random() - 6)
    part = canvas[y0 : y0 + size, x0 : x0 + size]
    part += alpha * (np.clip(ink * light[..., None], 0, 255) - part)


def _clouds(rng: random.Random) -> Array:
    """Smooth noise (SIDE, SIDE) in -1..1: seven by seven values, interpolated."""
    knots = np.array([rng.random() * 2 - 1 for _ in range(49)], np.float32).reshape(7, 7)
    at = np.linspace(0, 6, SIDE)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(7))).astype(np.float32)
    return np.asarray(weights @ knots @ weights.T, np.float32)


def background(name: str, texture: str, rng: random.Random) -> Array:
    """An empty canvas (SIDE, SIDE, 3) of 0..255."""
    tone = np.array([BACKGROUNDS[name] + 12 * rng.random() - 6 for _ in range(3)], np.float32)
    noise = np.zeros((SIDE, SIDE), np.float32)
    if texture == "grain":
        noise = (
            np.frombuffer(rng.randbytes(SIDE * SIDE), np.uint8).reshape(SIDE, SIDE) * np.float32(0.14) - 18
        )
    if texture == "clouds":
        noise = _clouds(rng) * 22
    return np.asarray(np.clip(noise[..., None] + tone, 0, 255), np.float32)

"""Twelve small pictures of different shapes, modes and orientations, drawn the same way everywhere."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

ORIENTATION = 0x0112  # EXIF tag


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """A gradient with shapes and noise, RGB."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 128)], axis=2)
    noisy = np.clip(base + rng.integers(-20, 21, base.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(noisy)
    draw = ImageDraw.Draw(image)
    draw.ellipse((width * 0.1, height * 0.1, width * 0.45, height * 0.5), fill=(200, 30, 30))
    draw.rectangle((width * 0.55, height * 0.4, width * 0.9, height * 0.9), fill=(30, 60, 200))
    return image


def png(image: Image.Image, **options: object) -> bytes:
    """Encoded as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def rotated(image: Image.Image, orientation: int) -> bytes:
    """PNG bytes with an EXIF orientation (1 to 8)."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return png(image, exif=exif)


@cache
def twelve() -> dict[str, bytes]:
    """Name -> encoded picture; drawn once, as quantizing colors and encoding take half a second."""
    palette = scene(300, 200, 3).quantize(64)
    return {
        "landscape": png(scene(640, 480)),
        "portrait": png(scene(300, 500, 1)),
        "square": png(scene(336, 336, 2)),
        "tiny": png(scene(20, 31, 4)),
        "wide": png(scene(1000, 90, 5)),
        "odd": png(scene(337, 505, 6)),
        "palette": png(palette),
        "grey": png(scene(400, 300, 7).convert("L")),
        "black-and-white": png(scene(350, 360, 8).convert("1")),
        "upside-down": rotated(scene(400, 300, 9), 3),
        "quarter-turn": rotated(scene(500, 300, 10), 6),
        "mirrored-turn": rotated(scene(300, 420, 11), 5),
    }


def four() -> list[bytes]:
    """The pictures that answers are compared on."""
    pictures = twelve()
    return [pictures[name] for name in ("landscape", "portrait", "square", "quarter-turn")]

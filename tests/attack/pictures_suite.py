"""Folders of other people's pictures: read as Pillow reads them, or refused by the name of their format.

    PYTHONPATH=tests python tests/attack/pictures_suite.py FOLDER...

Made for Pillow's own Tests/images and for EXIF samples (github.com/python-pillow/Pillow, github.com/ianare/exif-samples).
"Same" are pictures equal to Image.open, exif_transpose, transparency on white, 16 bits scaled. Prints a table and
each file that Pillow reads and this does not, or otherwise.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pocketllava import ImageError
from pocketllava.vision.image import load

WIDE = ("I", "F")
COLUMNS = ("same", "different", "refused by format", "refused as damaged, as Pillow", "refused, though Pillow reads it", "read, though Pillow refuses it")  # fmt: skip


def by_pillow(path: Path) -> npt.NDArray[np.uint8]:
    """(height, width, 3), of any format that Pillow knows. Raises whatever Pillow raises."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I;16"):
        grey = np.rint(np.asarray(image).astype(np.float64) / 257).astype(np.uint8)
        return np.stack([grey] * 3, axis=2)
    upper = image.convert("RGBA") if image.has_transparency_data else image.convert("RGB").convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, upper).convert("RGB"))


def compare(path: Path) -> str:
    """One of COLUMNS, and the reason behind a colon."""
    try:
        expected, reason = by_pillow(path), ""
    except Exception as error:
        expected, reason = None, repr(error)
    try:
        pixels = np.asarray(load(path))
    except ImageError as error:
        message = str(error).removeprefix(f"{path}: ")
        if (
            "expected one of PNG" in message
            or "expected none, LZW" in message
            or "expected baseline" in message
        ):
            return f"refused by format: {message}"
        return f"refused{', though Pillow reads it' if expected is not None else ' as damaged, as Pillow'}: {message}"
    if expected is None:
        return f"read, though Pillow refuses it: {reason}"
    wide = Image.open(path).mode in WIDE  # scaled here, clipped by Pillow's convert()
    return f"{'same' if wide or np.array_equal(pixels, expected) else 'different'}: "


def outcomes(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file of a folder, with what came of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            yield path, compare(path)


def main() -> None:
    """The command line of this file's first lines."""
    for folder in map(Path, sys.argv[1:]):
        counts = Counter[str]()
        for path, outcome in outcomes(folder):
            column, _, reason = outcome.partition(": ")
            counts[column] += 1
            if column not in ("same", "refused by format", "refused as damaged, as Pillow"):
                print(f"{column}: {path.relative_to(folder)}: {reason[:150]}")
        print(f"\n{folder}: {counts.total()} files")
        for column in COLUMNS:
            print(f"  {column}: {counts[column]}")


if __name__ == "__main__":
    main()

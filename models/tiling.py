"""How LLaVA-1.6 cuts a picture into tiles, and how many image tokens it takes: arithmetic on sizes.

Knows the grid of a picture's tiles, their padding and the newline column; touches no pixels and no features. Follows
transformers' LlavaNextImageProcessor, select_best_resolution and unpad_image, their rounding included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pocketllava.errors import UnsupportedCheckpoint

UNPAD = "spatial_unpad"
MERGE_TYPES = (UNPAD, "spatial", "flat")  # mm_patch_merge_type of the original code
NEXT_PINPOINTS = [
    [336, 672],
    [672, 336],
    [672, 672],
    [1008, 336],
    [336, 1008],
]  # LlavaNextConfig's, (height, width)
MAX_PINPOINTS = 64
MAX_TILES = 36  # of one picture: 6 x 6, the largest grid that was published

Size = tuple[int, int]  # (width, height) in pixels
Box = tuple[int, int, int, int]  # (top, bottom, left, right) in patches, ends excluded


@dataclass(frozen=True)
class Tiling:
    """The resolutions that a picture is fitted to, (width, height) in pixels, and how its tiles become one sequence.

    merge: "spatial_unpad" drops padded patches and ends each row of patches with the newline embedding; "spatial"
    joins the tiles row by row; "flat" gives one tile after the other. Where two resolutions fit equally well, the
    first one wins.
    """

    pinpoints: tuple[Size, ...]
    merge: str = UNPAD

    @property
    def newline(self) -> bool:
        """Whether a row of patches ends with the newline embedding."""
        return self.merge == UNPAD

    def layout(self, size: Size, side: int, grid: int) -> TileLayout:
        """Where a picture of this size lies on its tiles. side: of a tile in pixels; grid: patches along it."""
        return TileLayout(size, self.best(size), side, grid, self.merge)

    def best(self, size: Size) -> Size:
        """The resolution that keeps most of a picture's pixels, then wastes fewest: select_best_resolution."""
        width, height = size
        best, most, least = self.pinpoints[0], 0, math.inf
        for pin_width, pin_height in self.pinpoints:
            scale = min(pin_width / width, pin_height / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            wasted = pin_width * pin_height - effective
            if effective > most or (effective == most and wasted < least):
                best, most, least = (pin_width, pin_height), effective, wasted
        return best

    def most_tokens(self, side: int, grid: int) -> int:
        """An upper bound of the image tokens of any picture: every tile full, with its newlines."""
        tiles = [(width // side, height // side) for width, height in self.pinpoints]
        return grid**2 + max(rows * grid * (columns * grid + self.newline) for columns, rows in tiles)


@dataclass(frozen=True)
class TileLayout:
    """One picture on its tiles.

    size and resolution: (width, height) in pixels; side: of a tile in pixels; grid: patches along it. The first tile
    is the base: the whole picture, stretched to side x side. The others lie on `resolution`, row by row.
    """

    size: Size
    resolution: Size
    side: int
    grid: int
    merge: str

    @property
    def newline(self) -> bool:
        """Whether a row of patches ends with the newline embedding."""
        return self.merge == UNPAD

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return self.resolution[0] // self.side

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return self.resolution[1] // self.side

    @property
    def n_tiles(self) -> int:
        """Tiles, the base among them."""
        return 1 + self.rows * self.columns

    @property
    def scaled(self) -> Size:
        """The picture's size on `resolution`, aspect ratio kept: get_patch_output_size."""
        (width, height), (full_width, full_height) = self.size, self.resolution
        by_width, by_height = full_width / width, full_height / height
        if by_width < by_height:
            return full_width, min(math.ceil(height * by_width), full_height)
        return min(math.ceil(width * by_height), full_width), full_height

    @property
    def corner(self) -> Size:
        """Where the scaled picture is pasted: (left, top) in pixels."""
        (width, height), (full_width, full_height) = self.scaled, self.resolution
        return (full_width - width) // 2, (full_height - height) // 2

    @property
    def patches(self) -> Box:
        """(top, bottom, left, right) of the picture on the grid of all tiles' patches, ends excluded: unpad_image."""
        height, width = self.rows * self.grid, self.columns * self.grid
        if not self.newline:
            return 0, height, 0, width
        picture_width, picture_height = self.size
        if picture_width / picture_height > width / height:
            padding = (height - int(round(picture_height * (width / picture_width), 7))) // 2
            return padding, height - padding, 0, width
        padding = (width - int(round(picture_width * (height / picture_height), 7))) // 2
        return 0, height, padding, width - padding

    @property
    def boxes(self) -> list[Box]:
        """What is picture on each tile, the base first; a tile of padding has an empty box."""
        top, bottom, left, right = self.patches
        boxes = [(0, self.grid, 0, self.grid)]
        for row in range(self.rows):
            for column in range(self.columns):
                first, start = row * self.grid, column * self.grid
                edges = (top - first, bottom - first, left - start, right - start)
                upper, lower, west, east = (min(max(edge, 0), self.grid) for edge in edges)
                boxes.append((upper, lower, west, east))
        return boxes

    @property
    def candidates(self) -> list[int]:
        """Patches of each tile that are picture."""
        return [(bottom - top) * (right - left) for top, bottom, left, right in self.boxes]

    @property
    def n_tokens(self) -> int:
        """Positions in a prompt: the base's patches, the grid's, and a newline for each row."""
        top, bottom, left, right = self.patches
        return self.grid**2 + (bottom - top) * (right - left + self.newline)


def tiling(pinpoints: Any, merge: Any, side: int, *, height_first: bool) -> Tiling:
    """Check a config.json's image_grid_pinpoints.

    side: of a tile in pixels. height_first: transformers' order; the original code has the width first.
    Raises UnsupportedCheckpoint.
    """
    if merge not in MERGE_TYPES:
        raise UnsupportedCheckpoint(
            f"config.json: mm_patch_merge_type is {merge!r}, expected one of {', '.join(MERGE_TYPES)}"
        )
    if not isinstance(pinpoints, Sequence) or not 0 < len(pinpoints) <= MAX_PINPOINTS:
        count = len(pinpoints) if isinstance(pinpoints, Sequence) else repr(pinpoints)
        raise UnsupportedCheckpoint(
            f"config.json: image_grid_pinpoints holds {count} resolutions, expected 1 to {MAX_PINPOINTS}"
        )
    sizes = (_size(pinpoint, side) for pinpoint in pinpoints)
    return Tiling(tuple(size[::-1] if height_first else size for size in sizes), merge)


def flattened(pinpoints: Iterable[Size]) -> list[int]:
    """width, height, width, height ...: as an mmproj's clip.vision.image_grid_pinpoints holds them."""
    return [edge for size in pinpoints for edge in size]


def _size(pinpoint: Any, side: int) -> Size:
    """Two edges of whole tiles. Raises UnsupportedCheckpoint."""
    whole = isinstance(pinpoint, Sequence) and len(pinpoint) == 2 and all(type(e) is int for e in pinpoint)
    if not whole or any(edge <= 0 or edge % side for edge in pinpoint):
        raise UnsupportedCheckpoint(
            f"config.json: image_grid_pinpoints holds {pinpoint!r}, expected two multiples of {side} pixels"
        )
    first, second = pinpoint
    if first * second > MAX_TILES * side * side:
        raise UnsupportedCheckpoint(
            f"config.json: image_grid_pinpoints holds {pinpoint!r}, expected at most {MAX_TILES} tiles of {side}"
            " pixels"
        )
    return first, second

"""A prepared picture drawn as the vision tower sees it: its tiles, its patches, and which of them stand for it.

Knows pixels and a TileLayout; no tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from pocketllava.vision.feature_cache import Order
from pocketllava.vision.image_processor import PreparedImage

SCALE = 2  # of a pixel, so that lines between patches leave most of each
GAP = 16  # pixels between the whole picture and its tiles
PATCH_LINE, TILE_LINE, DIMMED = 0.75, (255, 64, 64), 0.2
BACKGROUND = 255


def draw(image: PreparedImage, grid: int, kept: Sequence[Order] | None = None) -> Image.Image:
    """RGB. grid: patches along a tile's side; kept: of each tile, the patches that are not left out, None for all.

    A tiled picture is its base on the left, and the tiles on the right with lines between them.
    """
    tiles = [_tile(tile, grid, None if kept is None else kept[n]) for n, tile in enumerate(image.tiles)]
    if image.layout is None:
        return Image.fromarray(tiles[0])
    side = len(tiles[0])
    width, height = image.layout.columns * side, image.layout.rows * side
    canvas = np.full((max(side, height), side + GAP + width, 3), BACKGROUND, np.uint8)
    canvas[:side, :side] = tiles[0]
    for n, tile in enumerate(tiles[1:]):
        row, column = divmod(n, image.layout.columns)
        tile[:2], tile[:, :2] = TILE_LINE, TILE_LINE
        top, left = row * side, side + GAP + column * side
        canvas[top : top + side, left : left + side] = tile
    return Image.fromarray(canvas)


def _tile(pixels: npt.NDArray[np.uint8], grid: int, kept: Order | None) -> npt.NDArray[np.uint8]:
    """(side, side, 3) -> (side * SCALE, side * SCALE, 3), with a grid of darker lines."""
    large = pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1).astype(np.float32)
    side = len(large)
    edges = np.arange(0, side, side // grid)
    if kept is not None:
        weight = np.full(grid * grid, DIMMED, np.float32)
        weight[kept] = 1
        patch = np.minimum(np.arange(side) // (side // grid), grid - 1)
        large *= weight.reshape(grid, grid)[patch][:, patch, None]
    large[edges] *= PATCH_LINE
    large[:, edges] *= PATCH_LINE
    return large.astype(np.uint8)

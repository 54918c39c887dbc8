"""A picture -> its tiles' pixels, and its tiles' features -> one sequence of feature rows, as LLaVA-1.6 does.

Knows pictures and a TileLayout; no vision tower, no prompt. Where transformers and llama.cpp differ (order of the
tiles, padding, newlines), transformers is followed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pocketllava.models.tiling import TileLayout
from pocketllava.vision.feature_cache import Features
from pocketllava.vision.image import Picture, Pixels, resize


def cut(picture: Picture, layout: TileLayout, resample: int) -> list[Pixels]:
    """A picture -> its tiles, each (side, side, 3) uint8: the base, then the grid's row by row.

    The base is the whole picture, stretched to a square. The grid's picture keeps its aspect ratio and is centered
    on black: LlavaNextImageProcessor, before rescaling and normalizing.
    """
    side = layout.side
    base = np.asarray(resize(picture, (side, side), resample))
    grid = Image.new("RGB", layout.resolution)
    grid.paste(resize(picture, layout.scaled, resample), layout.corner)
    rows = np.asarray(grid).reshape(layout.rows, side, layout.columns, side, 3).swapaxes(1, 2)
    return [base, *(np.ascontiguousarray(tile) for row in rows for tile in row)]


def pack(tiles: Sequence[Features], layout: TileLayout | None, newline: Features | None) -> Features:
    """Features of all tiles, each (grid * grid, n_embd), in the order of cut() -> (layout.n_tokens, n_embd).

    layout: None for a picture that is one tile. newline: (n_embd,), which ends each row of patches where the layout is
    unpadded. Follows pack_image_features of transformers' LlavaNextModel, and the merge types of the original
    prepare_inputs_labels_for_multimodal.
    """
    if layout is None:
        return tiles[0]
    if layout.merge == "flat":
        return np.concatenate(tiles)
    base, grid, width = tiles[0], layout.grid, tiles[0].shape[-1]
    squares = np.stack(tiles[1:]).reshape(layout.rows, layout.columns, grid, grid, width)
    patches = squares.swapaxes(1, 2).reshape(layout.rows * grid, layout.columns * grid, width)
    top, bottom, left, right = layout.patches
    patches = patches[top:bottom, left:right]
    if layout.newline and newline is not None:
        column = np.broadcast_to(newline, (len(patches), 1, width))
        patches = np.concatenate([patches, column], axis=1)
    return np.concatenate([base, patches.reshape(-1, width)])

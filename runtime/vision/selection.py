"""Which patches stand for a picture when it may take only N image tokens: SCOPE's greedy selection.

Knows arrays and a TileLayout; no tower, no prompt. The formula is that of "SCOPE: Saliency-Coverage Oriented Token
Pruning" (NeurIPS 2025, arXiv 2510.24214), alpha = 1; the code is our own.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pocketllava.models.tiling import TileLayout
from pocketllava.vision.feature_cache import Features, Order

METHOD = "scope-1"  # part of what tells a selected picture from others; counts changes to its choice


def scope_order(attention: Features, hidden: Features) -> npt.NDArray[np.intp]:
    """All patches, best first, so that the first N are the choice for any N.

    attention: (n,), what the class token gives each patch; hidden: (n, width), the tower's features. Each pick is the
    patch with the largest attention[j] * sum_i max(0, S[i, j] - c[i]), where S is the cosine similarity and c[i] the
    largest similarity of patch i to one picked before; the lower number at a tie.
    """
    unit = hidden / np.maximum(np.linalg.norm(hidden, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    covered = np.zeros(len(unit), np.float32)
    # Gains only fall as more is covered, so a stale gain is an upper bound: most need not be computed again.
    gains = attention * np.maximum(similarity, 0).sum(axis=0)
    heap = [(-gain, j, 0) for j, gain in enumerate(gains.tolist())]
    heapq.heapify(heap)
    order: list[int] = []
    while heap:
        _, j, n_picked = heap[0]
        if n_picked == len(order):
            heapq.heappop(heap)
            order.append(j)
            np.maximum(covered, similarity[j], out=covered)
        else:
            gain = float(attention[j] * np.maximum(similarity[j] - covered, 0).sum())
            heapq.heapreplace(heap, (-gain, j, len(order)))
    return np.array(order, np.intp)


def n_selected(n_tokens: int, layout: TileLayout | None, image_tokens: int | None) -> int:
    """Positions that a picture of n_tokens takes when image_tokens are asked for; all of them if that is more.

    Padded patches and newlines are not chosen from.
    """
    if image_tokens is None or image_tokens >= n_tokens:
        return n_tokens
    return min(image_tokens, sum(layout.candidates)) if layout else image_tokens


def budgets(n: int, candidates: Sequence[int]) -> list[int]:
    """n tokens, shared evenly by tiles, the first ones one more; what a tile cannot use goes to the others."""
    level = max(
        level
        for level in range(min(n, max(candidates)) + 1)
        if sum(min(most, level) for most in candidates) <= n
    )
    shares = [min(most, level) for most in candidates]
    open_tiles = [i for i, most in enumerate(candidates) if most > level]
    for i in open_tiles[: n - sum(shares)]:
        shares[i] += 1
    return shares


def chosen(orders: Sequence[Order], n: int) -> list[Order]:
    """The patches of each tile that are among a picture's n, in raster order."""
    shares = budgets(n, [len(order) for order in orders])
    return [np.sort(order[:share]) for order, share in zip(orders, shares, strict=True)]


def select(tiles: Sequence[Features], orders: Sequence[Order], layout: TileLayout | None, n: int) -> Features:
    """The n feature rows that stand for a picture, (n, n_embd), in raster order: the base's, then the grid's.

    tiles: (n_patches, n_embd) each, as pack() takes them; orders: of each tile's patches, padding left out. Rows of
    the grid run across its tiles, and no newline ends them, as in SCOPE's own LLaVA-1.6.
    """
    patches = chosen(orders, n)
    base = tiles[0][patches[0]]
    if layout is None:
        return base
    grid = np.concatenate([features[kept] for features, kept in zip(tiles[1:], patches[1:], strict=True)])
    places = np.concatenate([_places(layout, tile, kept) for tile, kept in enumerate(patches[1:])])
    return np.concatenate([base, grid[np.argsort(places, kind="stable")]])


def _places(layout: TileLayout, tile: int, patches: Order) -> npt.NDArray[np.int64]:
    """Raster numbers on the whole grid of one tile's patches."""
    row, column = divmod(tile, layout.columns)
    wide = patches.astype(np.int64)
    rows, columns = row * layout.grid + wide // layout.grid, column * layout.grid + wide % layout.grid
    return np.asarray(rows * layout.columns * layout.grid + columns)

"""What the KV cache holds, as token ids and image keys, and how much of it a new prompt can keep.

An image is known by its content: token ids cannot tell two pictures apart, and a cache that compares
ids alone shows the wrong one (JamePeng/llama-cpp-python #90). Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSpan:
    """A picture's place in a prompt: its key (of pixels and mmproj) and how many positions it takes."""

    key: str
    n_positions: int


Entry = int | ImageSpan


def n_positions(entries: Sequence[Entry]) -> int:
    """Positions that a prompt takes in the KV cache."""
    return sum(1 if isinstance(entry, int) else entry.n_positions for entry in entries)


def position_ids(entries: Sequence[Entry], image_id: int) -> list[int]:
    """One token id a position, image_id where pictures stand."""
    return [i for e in entries for i in ([e] if isinstance(e, int) else [image_id] * e.n_positions)]


def shared(held: Sequence[Entry], wanted: Sequence[Entry]) -> int:
    """How many entries at the start of `wanted` the cache holds."""
    n = 0
    for a, b in zip(held, wanted, strict=False):
        if a != b:
            break
        n += 1
    return n


def image_ends(entries: Sequence[Entry]) -> list[int]:
    """How many entries there are up to the end of each image, the last image first."""
    return [n for n in range(len(entries), 0, -1) if isinstance(entries[n - 1], ImageSpan)]

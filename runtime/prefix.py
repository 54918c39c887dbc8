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


def shared(held: Sequence[Entry], wanted: Sequence[Entry]) -> int:
    """How many entries at the start of `wanted` the cache holds, the last one of `wanted` never counted.

    The last entry is always evaluated, because its logits are what sampling needs.
    """
    n = 0
    for a, b in zip(held, wanted[:-1], strict=False):
        if a != b:
            break
        n += 1
    return n

"""What a prompt is made of: token ids, and images known by their content.

Token ids cannot tell two pictures apart, and a cache that compares ids alone shows the wrong one
(JamePeng/llama-cpp-python #90). Knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEAST_SHARE = 9  # 64 of LLaVA-1.5's 576


@dataclass(frozen=True)
class ImageSpan:
    """An image's place in a prompt: its key (of pixels and mmproj) and how many positions it takes."""

    key: str
    n_tokens: int


PromptItem = int | ImageSpan


def placeholders(n_tokens: Iterable[int]) -> list[ImageSpan]:
    """Spans for images that were not prepared yet, from their positions: enough to count a prompt."""
    return [ImageSpan(f"image {n}", count) for n, count in enumerate(n_tokens)]


def fill(items: Sequence[PromptItem], spans: Iterable[ImageSpan]) -> list[PromptItem]:
    """The same prompt with these spans, in the order of its images."""
    following = iter(spans)
    return [next(following) if isinstance(item, ImageSpan) else item for item in items]


def n_positions(items: Sequence[PromptItem]) -> int:
    """Positions that a prompt takes in the KV cache."""
    return sum(1 if isinstance(item, int) else item.n_tokens for item in items)


def position_ids(items: Sequence[PromptItem], image_id: int) -> list[int]:
    """One token id a position, image_id where pictures stand."""
    return [i for item in items for i in ([item] if isinstance(item, int) else [image_id] * item.n_tokens)]


def shared(contents: Sequence[PromptItem], prompt: Sequence[PromptItem]) -> int:
    """How many items at the start of two prompts are equal."""
    n = 0
    for a, b in zip(contents, prompt, strict=False):
        if a != b:
            break
        n += 1
    return n


def fitting_image_tokens(images: Sequence[int], room: int) -> int | None:
    """The most tokens that each image may take for all of them to fit `room` positions.

    None where that leaves an image too little: less than a ninth of its tokens has no published accuracy.
    """
    fitting = (n for n in range(max(images, default=0), 0, -1) if sum(min(n, m) for m in images) <= room)
    most = next(fitting, 0)
    return most if images and most * LEAST_SHARE >= max(images) else None


def image_ends(items: Sequence[PromptItem]) -> list[int]:
    """How many items there are up to the end of each image, the last image first."""
    return [n for n in range(len(items), 0, -1) if isinstance(items[n - 1], ImageSpan)]


def last_image_end(items: Sequence[PromptItem]) -> int:
    """How many items there are up to the end of the last image; 0 without one."""
    return next(iter(image_ends(items)), 0)


def runs(items: Sequence[PromptItem]) -> list[list[int] | ImageSpan]:
    """Text between images as lists of ids, images as they are."""
    parts: list[list[int] | ImageSpan] = []
    for item in items:
        if isinstance(item, ImageSpan):
            parts.append(item)
        elif parts and isinstance(parts[-1], list):
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts

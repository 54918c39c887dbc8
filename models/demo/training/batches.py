"""Questions of a scene -> packed token ids, labels and masks; knows the prompt, nothing of pictures or models.

One row is the prompt's start with the image, then several conversations that each see the image and themselves only.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pocketllava.models.demo import drawing, scenes, world
from training import vocabulary

IGNORE = -100
FILL = (vocabulary.PAD_ID, IGNORE, 0, -1)  # after a row's ids, labels, positions and segments
SEEN = (*world.COLORS, *world.SHAPES, *world.SIZES, *drawing.BACKGROUNDS, "left", "right", "top",
        "bottom", "center", "yes", "no", "and", "on", "I", "can", "an", "number")  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """ids, labels, positions, segments (n, length) and mask (n, 1, length, length).

    A label is -100 where nothing is to be learned; segment 0 is the start, k the k-th of the row's kinds.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor
    mask: Tensor
    kinds: list[list[str]]

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        tensors = (self.ids, self.labels, self.positions, self.segments, self.mask)
        ids, labels, positions, segments, mask = (t.to(device) for t in tensors)
        return Batch(ids, labels, positions, segments, mask, self.kinds)


class Packer:
    """Token ids exactly as the processor's chat template and tokenizer give them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, n_patches: int) -> None:
        self.encode: Callable[[str], tuple[int, ...]] = lru_cache(50_000)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        )
        self.newline = self.encode("\n")
        self.start = [1, *self.encode("USER: "), *[vocabulary.IMAGE_ID] * n_patches, *self.newline]

    def conversation(self, turns: Sequence[scenes.Turn]) -> tuple[list[int], list[int]]:
        """(ids, labels) after the start; a label is the id that comes next, </s> after each answer."""
        ids: list[int] = []
        labels: list[int] = []
        for k, turn in enumerate(turns):
            asked = f"USER: {turn.question} ASSISTANT:" if k else f"\n{turn.question} ASSISTANT:"
            question, answer = self.encode(asked)[0 if k else len(self.newline) :], self.encode(turn.answer)
            ids += [*question, *answer]
            labels += [IGNORE] * (len(question) - 1) + [*answer, 2]
        return ids, labels

    def row(self, picks: Sequence[scenes.QA], length: int) -> tuple[tuple[list[int], ...], list[str]]:
        """(ids, labels, positions, segments) up to length, and the kinds of the conversations that fitted."""
        n = len(self.start)
        ids, labels, positions, segments = [*self.start], [IGNORE] * n, [*range(n)], [0] * n
        kinds: list[str] = []
        for qa in picks:
            more, wanted = self.conversation(qa.turns)
            if len(ids) + len(more) <= length:
                kinds.append(qa.kind)
                ids, labels = ids + more, labels + wanted
                positions, segments = (
                    [*positions, *range(n, n + len(more))],
                    segments + [len(kinds)] * len(more),
                )
        return (ids, labels, positions, segments), kinds

    def batch(self, rows: Sequence[Sequence[scenes.QA]], length: int) -> Batch:
        """One row for each picture's questions, none longer than length."""
        packed = [self.row(picks, length) for picks in rows]
        length = max(len(columns[0]) for columns, _ in packed)
        padded = [
            [v + [f] * (length - len(v)) for v, f in zip(columns, FILL, strict=True)] for columns, _ in packed
        ]
        ids, labels, positions, segments = torch.tensor(padded).unbind(1)
        same = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        mask = (same & torch.ones(length, length).tril().bool())[:, None]
        return Batch(ids, labels, positions, segments, mask, [kinds for _, kinds in packed])

    def weights(self) -> Tensor:
        """How much each token's label counts (vocabulary,): words that only the picture tells 1, the rest 0.15."""
        values = torch.full((vocabulary.PIECES + 2,), 0.15)
        for word in SEEN:
            values[self.encode(word)[0]] = 1.0
        for digit in world.DIGITS:
            values[self.encode(digit)[-1]] = 1.0
        return values


def sample(s: world.Scene, rng: random.Random, share: dict[str, float], n: int) -> list[scenes.QA]:
    """n questions of this scene, kinds drawn by share; some joined to conversations of several turns."""
    every = (qa for _ in range(3) for qa in scenes.questions(s, int(rng.random() * 900) + 1))
    asked = [qa for qa in every if share.get(qa.kind, 0) > 0]
    order = sorted(asked, key=lambda qa: -(rng.random() ** (1 / share[qa.kind])))[:n]
    if order and rng.random() < share.get("joined", 0):
        order[:2] = [scenes.QA("joined", tuple(t for qa in order[:2] for t in qa.turns))]
    return order

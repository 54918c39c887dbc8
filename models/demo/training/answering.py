"""Training stages of the text model on a trained tower's features: captions of patches, then questions, easy first."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from pocketllava.models.demo import scenes
from training import batches, measure, pool, vocabulary
from training import model as llava
from training.seeing import VALIDATION, Seeing, by_patch, labels_of

LENGTH = 256  # ids in a row
PICTURES = 32  # in a batch, each with a dozen questions
EASY = {"what": 1.0, "background": 0.2}
LOOKUPS = {"what": 1.0, "content": 1.0, "place": 1.0, "color": 1.0, "size": 1.0, "background": 0.1}
HARD = {"left_right": 3.0, "count": 3.0, "follow_up": 2.5, "digit": 2.0, "place": 1.5}
EVERY = (
    dict.fromkeys(scenes.KINDS, 1.0) | HARD | {"background": 0.15, "color": 0.7, "shape": 0.7, "joined": 0.3}
)


class Answering:
    """Projector and text model over cached features (n, 36, width)."""

    def __init__(self, model: LlavaForConditionalGeneration, seeing: Seeing, packer: batches.Packer, cached: Tensor,
                 steps: int) -> None:  # fmt: skip
        self.model, self.seeing, self.packer, self.cached, self.steps = model, seeing, packer, cached, steps
        self.device, self.seed = seeing.device, seeing.seed
        self.weights = packer.weights().to(self.device)
        self.modules = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
        self.codes = self._codes()

    def _codes(self) -> list[Tensor]:
        """For each head (values, width): a direction for every value plus the embeddings of the words that say it."""
        made = torch.Generator().manual_seed(self.seed + 4)
        table = llava.build(self.seed).model.language_model.embed_tokens.weight.detach()
        found = [torch.randn(n, table.shape[1], generator=made) * 0.3 for n in pool.HEADS.values()]
        for code, words in zip(found, pool.WORDS, strict=True):
            for row, said in zip(code, words, strict=False):  # some heads have no words
                for word in said.split():
                    row += table[self.packer.encode(word)[-1]]
        return [code.to(self.device) for code in found]

    def align_loss(self, k: int) -> Tensor:
        """Loss over 256 pictures: each patch maps to the summed embeddings of the words that name its contents."""
        seeds = np.random.default_rng((self.seed, 4, k)).integers(0, len(self.cached), 256)
        labels = by_patch(labels_of(seeds.tolist())).to(self.device)
        wanted = torch.stack([code[labels[..., h]] for h, code in enumerate(self.codes)]).sum(0)
        made = self.model.model.multi_modal_projector(self.cached[seeds].to(self.device).float())
        return functional.mse_loss(made.float(), wanted)

    def answers(self, features: Tensor, batch: batches.Batch) -> tuple[Tensor, Tensor]:
        """(logits, label) at each position that has one: (m, vocabulary), (m,)."""
        inner = self.model.model
        at = batch.ids[0].tolist().index(vocabulary.IMAGE_ID)
        words = inner.language_model.embed_tokens(batch.ids)
        image = inner.multi_modal_projector(features).to(words.dtype)
        x = torch.cat([words[:, :at], image, words[:, at + llava.N_PATCHES :]], 1)
        out = inner.language_model(
            inputs_embeds=x, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        )
        where = batch.labels != batches.IGNORE
        return self.model.lm_head(out.last_hidden_state[where]), batch.labels[where]

    def asked(self, rng: np.random.Generator, share: dict[str, float]) -> tuple[list[int], batches.Batch]:
        """Random seeds of the pool and their questions."""
        seeds, draw = (
            rng.integers(0, len(self.cached), PICTURES).tolist(),
            random.Random(int(rng.integers(1 << 30))),
        )
        rows = [batches.sample(scenes.scene(s), draw, share, 16) for s in seeds]
        return seeds, self.packer.batch(rows, LENGTH).to(self.device)

    def _loss(self, features: Tensor, batch: batches.Batch) -> Tensor:
        logits, labels = self.answers(features, batch)
        weight = self.weights[labels]
        return (
            functional.cross_entropy(logits.float(), labels, reduction="none") * weight
        ).sum() / weight.sum()

    def loss(self, k: int) -> Tensor:
        """Loss of one step: names of things (the first 6 % of the steps), lookups (the next 10 %), then every kind."""
        part = k / self.steps
        share = EASY if part < 0.06 else LOOKUPS if part < 0.16 else EVERY
        seeds, batch = self.asked(np.random.default_rng((self.seed, 2, k)), share)
        return self._loss(self.cached[seeds].to(self.device).float(), batch)

    def joint_loss(self, k: int) -> Tensor:
        """Loss over every kind, with gradients through the tower."""
        seeds, batch = self.asked(np.random.default_rng((self.seed, 3, k)), EVERY)
        return self._loss(llava.vision_features(self.model, self.seeing.pictures(seeds)), batch)

    def measured(self) -> dict[str, Any]:
        """Share of validation conversations answered right, by kind, teacher-forced."""
        rows: list[tuple[str, bool]] = []
        for k in range(0, len(VALIDATION), 64):
            qas = [scenes.questions(scenes.scene(s)) for s in VALIDATION[k : k + 64]]
            batch = self.packer.batch(qas, 512).to(self.device)
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
                features = llava.vision_features(self.model, self.seeing.validation[k : k + 64])
                logits, labels = self.answers(features.float(), batch)
            rows += right_by_kind(batch, logits.argmax(-1) == labels)
        return measure.table(rows)

    def watch(self) -> str:
        """The shares on one line."""
        found = self.measured()
        return f"all {found['accuracy']:.3f} " + " ".join(f"{k} {v:.2f}" for k, v in found["by_type"].items())


def right_by_kind(batch: batches.Batch, right: Tensor) -> list[tuple[str, bool]]:
    """(kind, right) of every conversation; right (m,) is in the order of the labelled positions."""
    where = batch.labels != batches.IGNORE
    wrong = torch.zeros_like(batch.segments).masked_scatter(where, (~right).long())
    return [
        (kind, not bool(wrong[row][batch.segments[row] == k].any()))
        for row, kinds in enumerate(batch.kinds)
        for k, kind in enumerate(kinds, 1)
    ]

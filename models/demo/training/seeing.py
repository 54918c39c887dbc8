"""Training stage of the vision tower: classify every patch by the contents of its cell."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from pocketllava.models.demo import scenes
from training import model as llava
from training import pool

VALIDATION = scenes.TRAIN_SEEDS[-256:]  # watched while training; the held-out seeds are for the end


def labels_of(seeds: Iterable[int]) -> pool.Bytes:
    """Labels of these scenes' cells (n, 9, heads)."""
    return np.stack([pool.cells(scenes.scene(int(s))) for s in seeds])


def by_patch(labels: pool.Bytes) -> Tensor:
    """Cells (n, 9, heads) -> patches (n, 36, heads): a cell is 2 x 2 patches."""
    grid = torch.from_numpy(labels).long().view(-1, 3, 3, labels.shape[-1])
    return grid.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)


class Seeing:
    """The tower, a linear head for each label, and the pool."""

    def __init__(self, model: LlavaForConditionalGeneration, path: Path, n: int, seed: int,
                 device: torch.device) -> None:  # fmt: skip
        self.model, self.path, self.n, self.seed, self.device = model, path, n, seed, device
        self.heads = nn.Linear(llava.WIDTH, sum(pool.HEADS.values())).to(device)
        self.validation = torch.from_numpy(np.stack([scenes.scene(s).pixels() for s in VALIDATION])).to(
            device
        )

    def pictures(self, seeds: Iterable[int]) -> Tensor:
        """Pictures of the pool (n, 336, 336, 3)."""
        return torch.from_numpy(pool.read(self.path, seeds)).to(self.device)

    def values(self, pictures: Tensor) -> list[Tensor]:
        """Each head's values (n, 36, values)."""
        found: Tensor = self.heads(llava.vision_features(self.model, pictures))
        return list(torch.split(found, list(pool.HEADS.values()), -1))

    def loss(self, k: int) -> Tensor:
        """Loss over 64 pictures with shuffled cells, so that no picture repeats."""
        rng = np.random.default_rng((self.seed, 1, k))
        seeds = rng.integers(0, self.n, 64).tolist()
        pictures, labels = pool.shuffled(pool.read(self.path, seeds), labels_of(seeds), rng)
        wanted = by_patch(labels).to(self.device)
        values = self.values(torch.from_numpy(pictures).to(self.device))
        flat = [(v.flatten(0, 1).float(), wanted[..., h].flatten()) for h, v in enumerate(values)]
        losses = [functional.cross_entropy(*pair) for pair in flat]
        return torch.stack(losses).sum() + losses[0]  # shapes are the hardest

    def watch(self) -> str:
        """Share of nonempty patches classified right, by head."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            values = self.values(self.validation[:128])
        wanted = by_patch(labels_of(VALIDATION[:128])).to(self.device)
        seen = wanted[..., 0] > 0
        right = [(v.argmax(-1) == wanted[..., h])[seen].float().mean().item() for h, v in enumerate(values)]
        return " ".join(f"{head} {share:.3f}" for head, share in zip(pool.HEADS, right, strict=True))

    def features(self, pictures: Tensor) -> Tensor:
        """Features (n, 36, width) in F16, without gradients."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            return llava.vision_features(self.model, pictures).half().cpu()

    def cache(self, path: Path) -> Tensor:
        """Features of the whole pool (n, 36, width), computed once; call it after the tower is trained."""
        if not path.exists():
            parts = [range(k, min(k + 128, self.n)) for k in range(0, self.n, 128)]
            found = torch.cat([self.features(self.pictures(part)) for part in parts])
            torch.save(found, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        loaded: Tensor = torch.load(path)
        return loaded

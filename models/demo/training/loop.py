"""Runs one training stage, resumable at any step; knows nothing of the loss."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAVE_EVERY_S = 120.0


@dataclass(frozen=True)
class Stage:
    """Minimize loss(k) for k = 0 .. steps - 1; watch() describes the progress, every hundred steps."""

    name: str
    steps: int
    rate: float
    modules: Sequence[nn.Module]
    loss: Callable[[int], Tensor]
    watch: Callable[[], str] = str


def say(line: str) -> None:
    """One progress line."""
    print(time.strftime("%H:%M:%S"), line, flush=True)  # noqa: T201


class Loop:
    """AdamW with warm-up and a cosine, bf16 autocast, and a state file with the weights of `kept`."""

    def __init__(self, path: Path, kept: nn.ModuleDict, device: torch.device) -> None:
        self.path, self.kept, self.device = path, kept, device
        self.done: dict[str, int] = {}
        self.optimizer_state: dict[str, Any] = {}
        if path.exists():
            state = torch.load(path, map_location=device)
            kept.load_state_dict(state["kept"])
            self.done, self.optimizer_state = state["done"], state["optimizer"]

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Replace the state file atomically."""
        state = {"kept": self.kept.state_dict(), "done": self.done, "optimizer": optimizer.state_dict()}
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def run(self, stage: Stage) -> None:
        """Run the stage from the step after the last saved one."""
        first = self.done.get(stage.name, 0)
        if first >= stage.steps:
            return
        parameters = [p for m in stage.modules for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, stage.rate, betas=(0.9, 0.98), weight_decay=0.02)
        if first:
            optimizer.load_state_dict(self.optimizer_state)
        began = saved = time.monotonic()
        for k in range(first, stage.steps):
            loss = self._step(stage, k, optimizer, parameters)
            self.done[stage.name] = k + 1
            if k % 20 == 19:
                pace_s = (time.monotonic() - began) / (k + 1 - first)
                seen = stage.watch() if k % 100 == 99 or k + 1 == stage.steps else ""
                say(f"{stage.name} {k + 1}/{stage.steps} loss {loss:.4f} {pace_s:.2f} s/step {seen}")
            if time.monotonic() - saved > SAVE_EVERY_S or k + 1 == stage.steps:
                self.save(optimizer)
                saved = time.monotonic()

    def _step(
        self, stage: Stage, k: int, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
    ) -> float:
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * min(
                (k + 1) / 100, 0.04 + 0.48 * (1 + math.cos(math.pi * k / stage.steps))
            )
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = stage.loss(k)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.item())

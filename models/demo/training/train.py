"""Trains the demo LLaVA from nothing: `PYTHONPATH=models/demo python -m training.train --out DIR`.

Stages, each resumed where it stopped when the command is given again:
  pool    draw the pictures once
  vision  every patch names what its cell holds (seeing.py)
  align   the projector turns each patch into the sum of the words that say what it holds (answering.py)
  text    projector and text model on what the frozen tower sees: what things are, then lookups, then every kind
  joint   all weights together, gently
and then DIR/checkpoint and its held-out accuracy in DIR/accuracy.json.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from training import batches, measure, pool, vocabulary
from training import model as llava
from training.answering import Answering
from training.loop import Loop, Stage, say
from training.seeing import Seeing


@dataclass(frozen=True)
class Plan:
    """Steps of each stage; the model card gives the time on two cores."""

    out: Path
    pictures: int
    vision_steps: int
    text_steps: int
    joint_steps: int
    seed: int
    device: torch.device
    compiled: bool


def train(plan: Plan) -> LlavaForConditionalGeneration:
    """Run every stage in turn, from where the last run stopped."""
    plan.out.mkdir(parents=True, exist_ok=True)
    pictures = plan.out / "pool.rgb"
    pool.draw(pictures, plan.pictures, lambda n: say(f"pool {n}/{plan.pictures}"))
    model = llava.build(plan.seed)
    nn.Module.to(model, plan.device)
    seeing = Seeing(model, pictures, plan.pictures, plan.seed, plan.device)
    loop = Loop(plan.out / "state.pt", nn.ModuleDict({"model": model, "heads": seeing.heads}), plan.device)
    tower = (model.model.vision_tower, seeing.heads)
    loop.run(Stage("vision", plan.vision_steps, 1e-3, tower, seeing.loss, seeing.watch))
    vocabulary.write(plan.out / "tokens")
    packer = batches.Packer(AutoTokenizer.from_pretrained(plan.out / "tokens"), llava.N_PATCHES)
    cached = seeing.cache(plan.out / "features.pt")
    answering = Answering(model, seeing, packer, cached, plan.text_steps)
    for layer in model.model.language_model.layers if plan.compiled else ():
        layer.compile(dynamic=True)
    loop.run(Stage("align", 400, 2e-3, answering.modules[:1], answering.align_loss))
    loop.run(Stage("text", plan.text_steps, 1e-3, answering.modules, answering.loss, answering.watch))
    loop.run(Stage("joint", plan.joint_steps, 1e-4, (model,), answering.joint_loss, answering.watch))
    return model


def parsed() -> tuple[Plan, int]:
    """The plan and how many held-out questions to ask at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--pictures", type=int, default=16_000, help="in the pool, a third of a megabyte each"
    )
    parser.add_argument("--vision-steps", type=int, default=2400, help="of 64 pictures")
    parser.add_argument(
        "--text-steps", type=int, default=1450, help="of 32 pictures with a dozen questions each"
    )
    parser.add_argument("--joint-steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="a third off the text stage; needs a C++ compiler"
    )
    parser.add_argument("--questions", type=int, default=1000, help="held-out questions at the end")
    a = parser.parse_args()
    steps = (a.vision_steps, a.text_steps, a.joint_steps)
    return Plan(a.out, a.pictures, *steps, a.seed, torch.device(a.device), a.compile), a.questions


def main() -> None:
    """Train, save, measure."""
    plan, questions = parsed()
    llava.save(train(plan), plan.out / "checkpoint")
    found = json.dumps(measure.evaluate(plan.out / "checkpoint", questions), indent=2)
    (plan.out / "accuracy.json").write_text(found + "\n", encoding="utf-8")
    say(found)


if __name__ == "__main__":
    main()

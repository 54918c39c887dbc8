"""How well a checkpoint folder answers: transformers, float32, greedy, through its own processor and template.

`PYTHONPATH=models/demo python -m training.measure FOLDER -n 1000` prints one JSON object.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pocketllava.models.demo import scenes


def messages(turns: Sequence[scenes.Turn]) -> list[dict[str, Any]]:
    """The conversation up to the last question, as apply_chat_template takes it."""
    found: list[dict[str, Any]] = []
    for k, turn in enumerate(turns):
        content = [{"type": "image"}] * (k == 0) + [{"type": "text", "text": turn.question}]
        found.append({"role": "user", "content": content})
        found.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return found[:-1]


def normal(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def table(rows: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    """{"accuracy", "by_type", "n"} of (kind, right)."""
    by_type: Mapping[str, list[bool]] = defaultdict(list)
    for kind, right in rows:
        by_type[kind].append(right)
    every = [right for group in by_type.values() for right in group]
    shares = {kind: round(sum(group) / len(group), 4) for kind, group in sorted(by_type.items())}
    return {"accuracy": round(sum(every) / len(every), 4), "by_type": shares, "n": len(every)}


def evaluate(folder: Path, n: int, wrong: list[tuple[int, str, str]] | None = None) -> dict[str, Any]:
    """The table over n held-out questions; (seed, question, answer) of the wrong ones are appended to wrong."""
    processor = AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    rows: list[tuple[str, bool]] = []
    for scene, qa in scenes.held_out(n):
        prompt = processor.apply_chat_template(messages(qa.turns), add_generation_prompt=True)
        inputs = processor(images=scene.draw(), text=prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=96)  # type: ignore[misc]
        answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rows.append((qa.kind, normal(answer) == normal(qa.turns[-1].answer)))
        if wrong is not None and not rows[-1][1]:
            wrong.append((scene.seed, qa.turns[-1].question, answer))
    return table(rows)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-n", type=int, default=1000, help="held-out questions")
    a = parser.parse_args()
    print(json.dumps(evaluate(a.folder, a.n), indent=2))  # noqa: T201


if __name__ == "__main__":
    main()

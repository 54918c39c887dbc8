"""How many greedy tokens equal transformers', and how far features are from its own and from the CPU's.

    python -m devices.parity FOLDER default|exact|fast      prints one JSON object

Knows the recorded results (tests/recorded.py) and their checkpoints; not which device there is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pictures
import recorded
import small_checkpoint

from pocketllava import Bundle, Llava, Options
from pocketllava.convert import convert
from pocketllava.prompt.items import shared

MODES = {"default": None, "exact": True, "fast": False}
GREEDY = Options(max_tokens=recorded.N_TOKENS)


def bundles(folder: Path) -> dict[str, Bundle]:
    """The three bundles whose answers are recorded, converted once."""
    found = {}
    for number, (name, (layout, quant, mmproj)) in enumerate(recorded.ANSWERED.items()):
        out = folder / f"bundle-{number}"
        if not out.exists():
            checkpoint = folder / f"checkpoint-{number}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            small_checkpoint.write(checkpoint, small_checkpoint.Layout(**layout))
            convert(checkpoint, out, quant=quant, mmproj=mmproj)
        found[name] = Bundle.open(out)
    return found


def compare(name: str, bundle: Bundle, exact: bool | None) -> dict[str, Any]:
    """Tokens up to the first that differs, of all; the features of each picture, and their errors from the CPU's."""
    expected = recorded.load()[f"answers, {name}"]
    with Llava.load(bundle.folder, exact=exact) as llava:
        answers = [llava.ask(data, recorded.QUESTION, options=GREEDY).token_ids for data in pictures.four()]
        features = [llava.image_features(data) for data in pictures.four()]
        devices = llava.devices
    with Llava.load(bundle.folder, n_gpu_layers=0) as llava:
        on_cpu = [llava.image_features(data) for data in pictures.four()]
    equal = [shared(list(ids), wanted) for ids, wanted in zip(answers, expected, strict=True)]
    errors = [recorded.relative_error(found, cpus) for found, cpus in zip(features, on_cpu, strict=True)]
    return {
        "equal": sum(equal),
        "of": sum(map(len, expected)),
        "features": features,
        "from_cpu": max(errors),
        "devices": devices,
    }


def figures(folder: Path, exact: bool | None) -> dict[str, Any]:
    """Of all three checkpoints: counts of tokens, the worst error of features, and the devices."""
    each = [compare(name, bundle, exact) for name, bundle in bundles(folder).items()]
    recorded_rows = each[0]["features"][0][recorded.FEATURE_ROWS]  # of the first checkpoint and picture
    return {
        "tokens": [it["equal"] for it in each],
        "of": sum(it["of"] for it in each),
        "features": recorded.relative_error(recorded_rows, recorded.features()),
        "features_from_cpu": max(it["from_cpu"] for it in each),
        "devices": each[0]["devices"],
    }


if __name__ == "__main__":
    print(json.dumps(figures(Path(sys.argv[1]), MODES[sys.argv[2]]), default=float))

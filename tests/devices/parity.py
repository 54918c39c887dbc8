"""How many greedy tokens equal transformers', and how far features are from its own and from the CPU's.

    python -m devices.parity FOLDER      prints one JSON object; what computes is the environment's and the options'

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


def compare(name: str, bundle: Bundle, **load: Any) -> dict[str, Any]:
    """Tokens before the first that differs, of all; and the features of each picture."""
    expected = recorded.load()[f"answers, {name}"]
    with Llava.load(bundle.folder, **load) as llava:
        answers = [llava.ask(data, recorded.QUESTION, options=GREEDY).token_ids for data in pictures.four()]
        features = [llava.image_features(data) for data in pictures.four()]
        devices = llava.devices
    equal = [shared(list(ids), wanted) for ids, wanted in zip(answers, expected, strict=True)]
    return {
        "equal": sum(equal),
        "of": sum(map(len, expected)),
        "features": features,
        "devices": devices,
    }


def figures(folder: Path) -> dict[str, Any]:
    """Of all three checkpoints: counts of tokens, the worst error of features, and the devices."""
    found, worst = {}, 0.0
    for name, bundle in bundles(folder).items():
        found[name] = compare(name, bundle)
        on_cpu = compare(name, bundle, n_gpu_layers=0)["features"]
        pairs = zip(found[name]["features"], on_cpu, strict=True)
        worst = max(worst, *(recorded.relative_error(mine, cpus) for mine, cpus in pairs))
    first = next(iter(found.values()))  # the one whose features are recorded
    return {
        "tokens": sum(it["equal"] for it in found.values()),
        "of": sum(it["of"] for it in found.values()),
        "each": [it["equal"] for it in found.values()],
        "features": recorded.relative_error(first["features"][0][recorded.FEATURE_ROWS], recorded.features()),
        "features_from_cpu": worst,
        "devices": first["devices"],
    }


if __name__ == "__main__":
    print(json.dumps(figures(Path(sys.argv[1])), default=float))

"""Results of transformers in float32, recorded with versions, so that every machine can hold ours to them.

`make reference` computes them anew and compares; `pytest -m reference --record` writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import small_checkpoint

FOLDER = Path(__file__).parent / "recorded"
ORIGINAL_FILE = FOLDER / "original.json"  # the original authors' layout
JSON_FILE, FEATURES_FILE = FOLDER / "transformers.json", FOLDER / "features.npy"
FEATURE_ROWS = slice(None, None, 8)  # every eighth patch is recorded
QUESTION = "What is shown in the image?"
N_TOKENS = 15
TIE = 1e-3  # of the logits' standard deviation: what features that are 5e-4 off can turn
# name -> (checkpoint's layout, --quant, --mmproj) of the bundles whose answers are compared
ANSWERED: dict[str, tuple[dict[str, Any], str, str]] = {
    "old names, F16": ({}, "F16", "F16"),
    "new names, BF16, two shards": ({"naming": "new", "dtype": "BF16", "shards": 2, "seed": 1}, "F16", "F16"),
    "newest names, F32, grouped queries": (
        {"naming": "newest", "dtype": "F32", "kv_heads": 2, "seed": 2}, "F32", "F32"
    ),
}  # fmt: skip


def load(file: Path = JSON_FILE) -> dict[str, Any]:
    """The recording."""
    return dict(json.loads(file.read_text("utf-8")))


def features() -> npt.NDArray[np.float32]:
    """Image features of the first picture and checkpoint, rows FEATURE_ROWS."""
    return np.asarray(np.load(FEATURES_FILE))


def keep(name: str, value: Any, file: Path = JSON_FILE) -> None:
    """Write one part of the recording."""
    FOLDER.mkdir(exist_ok=True)
    data = load(file) if file.exists() else {}
    data[name] = value
    file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")


def relative_error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """||found - expected|| / ||expected||."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def ties_of(logits: list[npt.NDArray[Any]]) -> list[list[int]]:
    """Of each step's logits (n_vocab,) the tokens that rounding may put first: within TIE of the largest."""
    return [
        sorted(int(i) for i in np.flatnonzero(step >= step.max() - TIE * np.std(step))) for step in logits
    ]


def assert_equal_or_tie(found: list[int], expected: list[int], ties: list[list[int]]) -> None:
    """Equal, or parting at a tie of the reference's: float32 sums in another order may decide it another way.

    What comes after that answers another prompt.
    """
    n = next((k for k, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
    if n < len(expected) or len(found) != len(expected):
        assert n < min(len(found), len(ties)), f"another length: {found} instead of {expected}"
        assert found[n] in ties[n], f"parts at token {n}: {found} instead of {expected}"


def image_token() -> int:
    """<image> in the small tokenizer."""
    return len(small_checkpoint.small_tokenizer.vocabulary())

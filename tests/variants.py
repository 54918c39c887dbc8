"""The layouts beyond llava-1.5 and what transformers gave for them, recorded with versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "recorded" / "variants.json"
LAYOUTS: dict[str, dict[str, Any]] = {
    "Llama 3": {"llama3": True, "seed": 11},
    "Llama 3.1": {"llama3": True, "rope": "llama3", "kv_heads": 2, "seed": 12, "dtype": "BF16"},
    "Mistral": {"kind": "mistral", "kv_heads": 2, "seed": 13},
    "SigLIP": {"llama3": True, "siglip": True, "seed": 14},
    "three feature layers": {"vision_layers": 8, "feature_layer": (-2, -8, -5), "seed": 15},
}


def load() -> dict[str, Any]:
    """The recording."""
    return dict(json.loads(FILE.read_text("utf-8"))) if FILE.exists() else {}


def keep(name: str, value: Any) -> None:
    """Write one part of the recording."""
    FILE.write_text(json.dumps({**load(), name: value}, indent=0, ensure_ascii=False) + "\n", "utf-8")

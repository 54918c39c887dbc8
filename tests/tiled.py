"""LLaVA-1.6's layouts, pictures' sizes and conversations, and what transformers gave for them, recorded with versions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pictures
from PIL import Image
from small_checkpoint import IMAGE, PINPOINTS

from pocketllava import Message
from pocketllava.models.tiling import Tiling

FILE = Path(__file__).parent / "recorded" / "tiled.json"
FEATURES_FILE = FILE.with_name("tiled_features.npy")
FEATURE_ROWS = slice(None, None, 3)
N_TOKENS = 12  # of each answer; five conversations make 60
SIDE = 56  # pixels of the small towers' tiles: 16 patches
SMALL = {
    "tiled": True,
    "image": SIDE,
    "pinpoints": tuple((h * SIDE // IMAGE, w * SIDE // IMAGE) for h, w in PINPOINTS),
    "layers": 2,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "Vicuna": {**SMALL, "seed": 31},
    "Mistral": {**SMALL, "kind": "mistral", "kv_heads": 2, "theta": 1e6, "inst": True, "naming": "new", "seed": 31},
    "Llama 3": {**SMALL, "llama3": True, "kv_heads": 2, "naming": "newest", "seed": 25},
    "ChatML": {**SMALL, "chatml": True, "hidden": 448, "heads": 14, "kv_heads": 2, "theta": 5e6, "seed": 24},
}  # fmt: skip
NINE = ((336, 672), (672, 336), (672, 672), (1008, 1008))  # (height, width): 3 x 3 tiles among them
PINPOINT_SETS = {"published": PINPOINTS, "3 x 3": NINE}
Turn = tuple[str, str, tuple[str, ...]]  # role, text, names of pictures
CONVERSATIONS: dict[str, list[Turn]] = {
    "landscape": [("user", "What is shown in the image?", ("landscape",))],
    "portrait": [("user", "What is shown in the image?", ("portrait",))],
    "wide": [("user", "What is shown in the image?", ("wide",))],
    "two turns": [
        ("user", "What is shown in the image?", ("landscape",)),
        ("assistant", "A red circle.", ()),
        ("user", "Is there a blue square?", ()),
    ],
    "two pictures": [("user", "Compare the two images.", ("portrait", "wide"))],
}


def load() -> dict[str, Any]:
    """The recording."""
    return dict(json.loads(FILE.read_text("utf-8"))) if FILE.exists() else {}


def keep(name: str, value: Any) -> None:
    """Write one part of the recording."""
    FILE.write_text(json.dumps({**load(), name: value}, ensure_ascii=False) + "\n", "utf-8")


def features() -> npt.NDArray[np.float32]:
    """Of the first layout and picture, rows FEATURE_ROWS."""
    return np.asarray(np.load(FEATURES_FILE))


def many() -> dict[str, bytes]:
    """Twelve pictures, and noise of odd sizes, where transformers could take height or width for channels."""
    rng, odd = np.random.default_rng(16), ((1, 1), (1, 3), (3, 3), (500, 3), (1, 20_000), (20_000, 1))
    noise = {(w, h): Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in odd}
    return pictures.twelve() | {f"{w} x {h}": pictures.png(image) for (w, h), image in noise.items()}


def sizes() -> list[tuple[int, int]]:
    """(width, height): 500 random ones from 1 x 1 to 6000 x 4000, and each edge of every pinpoint, one pixel around."""
    rng = random.Random(16)
    drawn = [(round(6000 ** rng.random()), round(4000 ** rng.random())) for _ in range(250)]
    drawn += [(rng.randint(1, 6000), rng.randint(1, 4000)) for _ in range(250)]
    around = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0), (0, 1), (1, -1), (1, 0), (1, 1)]
    edges = [(w + x, h + y) for h, w in {*PINPOINTS, *NINE, (336, 336)} for x, y in around]
    return [(1, 1), (6000, 4000), *drawn, *sorted(edges)]


def tiling_of(pinpoints: tuple[tuple[int, int], ...]) -> Tiling:
    """Of (height, width) pairs."""
    return Tiling(tuple((w, h) for h, w in pinpoints))


def messages(turns: list[Turn]) -> list[Message]:
    """As pocketllava takes them."""
    data = pictures.twelve()
    return [Message(role, text, [data[name] for name in names]) for role, text, names in turns]  # type: ignore[arg-type]


def for_transformers(turns: list[Turn]) -> list[dict[str, Any]]:
    """As transformers' chat templates take them: images before the text."""
    return [
        {"role": role, "content": [{"type": "image"}] * len(names) + [{"type": "text", "text": text}]}
        for role, text, names in turns
    ]

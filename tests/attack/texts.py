"""Damaged bundle.json, preprocessing settings, and lines typed into chat: checked, or refused in one line."""

from __future__ import annotations

import functools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import small_checkpoint
from attack.child import Target
from damage import bytes_changed, json_changed
from PIL import Image

from pocketllava.chat.dialogue import Dialogue, Gallery
from pocketllava.chat.slash import COMMANDS, handle
from pocketllava.models.manifest import Manifest
from pocketllava.models.preprocessing import preprocessing
from pocketllava.vision.image import decode, load, resize_and_crop

SIDE = 336
RECORD = {"bytes": 1000, "header_bytes": 100, "header_sha256": "0" * 64, "sha256": "1" * 64}
MANIFEST: dict[str, Any] = {
    "format": 1,
    "pocketllava": "0.1.0",
    "source": {"id": "a/b", "revision": None, "weights": {"model.safetensors": 10}},
    "types": {"model": "Q4_K_M", "mmproj": "F16"},
    "files": {"model.gguf": RECORD, "mmproj.gguf": RECORD},
    "image": {"token": "<image>", "token_id": 32000, "n_patches": 576, "vision_width": 64, "projected_width": 256},
    "tokenizer": {"space_prefix": "every"},
    "eos_token_ids": [2],
    "preprocessing": {"shortest_edge": SIDE, "crop_size": SIDE, "resample": 3, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.3], "pad_to_square": False},
    "chat_template": "{{ messages }}",
    "quantized_from": {"types": {"model": "F16", "mmproj": "F16"}, "sha256": {"model.gguf": "2" * 64}},
}  # fmt: skip
PIECES = (
    "what", "is", "photo.png", "a.png", "no such.jpg", "'", '"', "\\", "\\ ", " ", "  ", "\t", "\n", "/", "//", "~", "~/", "./",
    "file:///", "https://x.y/z.png", "data:image/png;base64,", "C:\\", "&", "(", ")", "[", "<", "?", ".png", ".HEIC", ".avif",
    "\ud800", "\0", "\x1b[2J", "é", "日本.webp", "🙂", "x" * 3000, "{FOLDER}/a.png", "{FOLDER}/my photo.png", "/dev/zero", "..",
    *(f"/{name} " for name in COMMANDS if name not in ("save",)),
)  # fmt: skip


def damaged_json(rng: random.Random, value: Any) -> bytes:
    """Values changed, or bytes."""
    for _ in range(rng.choice((0, 1, 1, 1, 3))):
        value = json_changed(rng, value)
    data = json.dumps(value).encode()
    return bytes_changed(rng, data) if rng.random() < 0.2 else data


def open_manifest(data: bytes, folder: Path) -> None:
    """Read it as a bundle's; what is accepted is written as it was read."""
    (folder / "bundle.json").write_bytes(data)
    manifest = Manifest.read(folder / "bundle.json")
    assert Manifest.from_json(manifest.to_json(), folder) == manifest


@functools.cache
def processors() -> list[dict[str, Any]]:
    """The hub's, the original authors' and SigLIP's settings, and those of current transformers."""
    with tempfile.TemporaryDirectory() as place:
        folder = small_checkpoint.write(Path(place) / "a", layers=1, ffn=256)
        hub = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    siglip = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "resample": 3,
    }
    return [
        hub,
        siglip,
        {**hub, "image_processor_type": "LlavaImageProcessor", "do_pad": True},
        {"size": SIDE, "crop_size": SIDE},
    ]


def settings(rng: random.Random) -> bytes:
    """A damaged preprocessor_config.json, or processor_config.json."""
    files: Any = {"preprocessor_config.json": rng.choice(processors())}
    if rng.random() < 0.3:
        files = {
            "processor_config.json": {
                "image_processor": files["preprocessor_config.json"],
                "processor_class": "LlavaProcessor",
            }
        }
    name = next(iter(files))
    return damaged_json(rng, files[name]) + name.encode()


def prepare(data: bytes, _folder: Path) -> None:
    """Read the settings as a conversion does, and prepare a picture with them."""
    name = (
        "preprocessor_config.json" if data.endswith(b"preprocessor_config.json") else "processor_config.json"
    )
    try:
        content = json.loads(data.removesuffix(name.encode()))
    except (ValueError, RecursionError):
        content = None
    steps = preprocessing({name: content}, SIDE)
    pixels = resize_and_crop(decode(Image.new("RGB", (40, 30)), "image"), steps)
    assert pixels.shape == (SIDE, SIDE, 3), pixels.shape


def line(rng: random.Random) -> bytes:
    """Something typed or pasted."""
    text = "".join(rng.choice(PIECES) + rng.choice(("", " ", " ")) for _ in range(rng.randrange(12)))
    return text.encode("utf-8", "surrogatepass")


def type_line(data: bytes, folder: Path) -> None:
    """Handle it as chat does; a question that comes of it names no picture it does not show."""
    if not (folder / "a.png").exists():
        for name in ("a.png", "my photo.png"):
            Image.new("RGB", (8, 8)).save(folder / name)
    text = data.decode("utf-8", "surrogatepass").replace("{FOLDER}", str(folder))
    dialogue = Dialogue(Gallery(lambda source: load(source).size))
    step = handle(dialogue, text.encode("utf-8", "replace").decode())
    if step.question is not None and not text.strip().startswith(("//", "/system")):
        words = step.question.turn.text.split()
        assert not any(
            w.lower().endswith((".png", ".heic", ".webp")) and len(w) > 6 and w[-6].isalnum() for w in words
        ), words


TARGETS = {
    "bundle.json": Target(lambda rng: damaged_json(rng, MANIFEST), open_manifest),
    "preprocessing": Target(settings, prepare),
    "chat line": Target(line, type_line),
}

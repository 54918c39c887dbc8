"""A text model and an mmproj that were published as two files -> a bundle where they lie.

Writes bundle.json beside them, so that they can be asked. Knows the keys of both files and what llama.cpp's scripts
leave out of them: then the model is taken for one of the original authors, whose code pads pictures to a square.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import LlamaFileType

from pocketllava.convert.read.original import conversation
from pocketllava.errors import BundleError, ConvertError
from pocketllava.models.bundle import MANIFEST, MMPROJ, MODEL, Bundle, Manifest, describe_file, sha256
from pocketllava.models.files import atomic_write, utf8
from pocketllava.models.gguf_header import Header
from pocketllava.models.gguf_writer import ARCHITECTURE
from pocketllava.models.manifest import IMAGE_TOKEN, Source, Types
from pocketllava.models.mmproj_contract import MmprojInfo, check_mmproj
from pocketllava.models.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from pocketllava.models.text_contract import check_text
from pocketllava.version import __version__

FILE_TYPE, TEMPLATE = "general.file_type", "tokenizer.chat_template"
TOKENS, END = "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id"
DEFAULT_END = 2  # llama.cpp's own for SPM vocabularies


def text_model_beside(mmproj: Path) -> Path | None:
    """The one text model in an mmproj's folder; None for none, or several."""
    models = [path for path in sorted(mmproj.parent.glob("*.gguf")) if _architecture(path) == "llama"]
    return models[0] if len(models) == 1 else None


def join(model: Path, mmproj: Path) -> Bundle:
    """Write bundle.json for two files of one folder (reads both whole, for their hashes).

    Raises ConvertError where they do not belong together, or llama.cpp could not use them.
    """
    folder = mmproj.parent
    try:
        text, vision = Header.read(model), Header.read(mmproj)
        width, info = check_text(text).n_embd, check_mmproj(vision)
    except BundleError as error:
        raise ConvertError(str(error)) from error
    if width != info.projected_width:
        raise ConvertError(
            f"{mmproj}: projects to width {info.projected_width}, {model.name} has {width}; another model's"
        )
    manifest = _manifest(text, vision, info)
    try:
        with atomic_write(folder / MANIFEST) as part:
            part.write_text(json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise ConvertError(f"{folder / MANIFEST}: cannot be written ({error.strerror or error})") from error
    return Bundle.open(folder)


def _architecture(path: Path) -> object:
    try:
        return Header.read(path).keys.get(ARCHITECTURE)
    except BundleError:
        return None


def _manifest(text: Header, vision: Header, info: MmprojInfo) -> Manifest:
    keys, headers = text.keys, {MODEL: text, MMPROJ: vision}
    tokens = keys[TOKENS]
    image_id = tokens.index(IMAGE_TOKEN) if IMAGE_TOKEN in tokens else None
    own = str(keys.get(TEMPLATE, ""))
    return Manifest(
        version=__version__,
        source=Source(utf8(text.path.parent.resolve().name) or "model", None, {}),
        types=Types(_type(keys), _type(vision.keys)),
        files={name: describe_file(header, sha256(header.path)) for name, header in headers.items()},
        file_names={name: header.path.name for name, header in headers.items()},
        image_token=IMAGE_TOKEN,
        image_token_id=image_id,
        n_patches=info.n_patches,
        vision_width=info.vision_width,
        projected_width=info.projected_width,
        space_prefix="every" if keys.get("tokenizer.ggml.add_space_prefix", True) else "none",
        eos_token_ids=(keys.get(END, DEFAULT_END),),
        preprocessing=Preprocessing(
            shortest_edge=info.image_size,
            crop_size=info.image_size,
            mean=_three(vision.keys["clip.vision.image_mean"], CLIP_MEAN),
            std=_three(vision.keys["clip.vision.image_std"], CLIP_STD),
            pad_to_square=image_id is None and info.tiling is None,
            tiling=info.tiling,
        ),
        chat_template=own if "image" in own else conversation({}, tokens),
    )


def _three(stored: list[float], exact: tuple[float, float, float]) -> tuple[float, float, float]:
    """CLIP's own numbers where the file holds them, which it does in float32."""
    r, g, b = exact if np.allclose(stored, exact, rtol=1e-6, atol=0) else stored
    return float(r), float(g), float(b)


def _type(keys: Mapping[str, Any]) -> str:
    """Such as "Q4_K_M"."""
    try:
        return str(LlamaFileType(keys.get(FILE_TYPE)).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return "unknown"

"""A text model and an mmproj that were published as two files -> a bundle where they lie.

Writes bundle.json beside them, so that they can be asked. Knows the keys of both files and what llama.cpp's scripts
leave out of them: then the model is taken for one of the original authors, whose code pads pictures to a square.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketllava.convert.read.original import CHATML, LLAMA_3, MISTRAL_INSTRUCT, VICUNA_V1, conversation
from pocketllava.errors import BundleError, ConvertError, UnsupportedOption
from pocketllava.models.bundle import DEFAULT_TEMPLATE, MANIFEST, MMPROJ, MODEL, Bundle, describe_file, sha256
from pocketllava.models.file_type import type_name
from pocketllava.models.files import atomic_write, utf8
from pocketllava.models.gguf_header import Header, architecture
from pocketllava.models.manifest import IMAGE_TOKEN, FileRecord, Manifest, Reference, Source, Types
from pocketllava.models.mmproj_contract import MmprojInfo, check_mmproj
from pocketllava.models.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from pocketllava.models.text_contract import check_text
from pocketllava.version import __version__

TEMPLATE = "tokenizer.chat_template"
TOKENS, END = "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id"
DEFAULT_END = 2  # llama.cpp's own for SPM vocabularies
HEADS, KV_HEADS = "llama.attention.head_count", "llama.attention.head_count_kv"
ROPE_BASE = "llama.rope.freq_base"
INSTRUCT_V2 = 1e6  # Mistral-Instruct 0.2, of LLaVA-1.6; BakLLaVA's 0.1 has 1e4
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")
OWN = "its own"
TEMPLATES = {
    "vicuna_v1": VICUNA_V1,
    "llava-hf": DEFAULT_TEMPLATE,
    "mistral": MISTRAL_INSTRUCT,
    "llama-3": LLAMA_3,
    "chatml": CHATML,
}


def text_model_beside(mmproj: Path) -> Path | None:
    """The one text model in an mmproj's folder; None for none, or several."""
    models = [path for path in sorted(mmproj.parent.glob("*.gguf")) if architecture(path) == "llama"]
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
    headers = {MODEL: text, MMPROJ: vision}
    values = manifest(
        text,
        vision,
        info,
        style(text, info),
        files={name: describe_file(header, sha256(header.path)) for name, header in headers.items()},
        source=Source(utf8(folder.resolve().name) or "model", None, {}),
        file_names={name: header.path.name for name, header in headers.items()},
    )
    write_manifest(folder, values)
    return Bundle.open(folder)


@dataclass(frozen=True)
class Style:
    """How a pair is asked and how it is shown pictures, which files of llama.cpp's scripts do not say.

    name: one of TEMPLATES, or OWN. template: in Jinja. pad: to a square, instead of cropping.
    """

    name: str
    template: str
    pad: bool


def style(
    text: Header,
    info: MmprojInfo,
    template: str | None = None,
    pad: bool | None = None,
    *,
    likely: str | None = None,
) -> Style:
    """What was said, else what the headers let one assume; likely: the prompt that its program gives it.

    Raises UnsupportedOption for pad with tiled pictures.
    """
    if pad is not None and info.tiling is not None:
        raise UnsupportedOption(
            f"pad: {text.path.name} is a LLaVA-1.6, which is shown tiles; expected neither --pad nor --crop"
        )
    own = str(text.keys.get(TEMPLATE, ""))
    pads = IMAGE_TOKEN not in text.keys[TOKENS] and info.tiling is None if pad is None else pad
    if template is None and "image" in own:
        return Style(OWN, own, pads)
    name = template or likely or _likely_template(text, info)
    return Style(name, TEMPLATES[name], pads)


def _likely_template(text: Header, info: MmprojInfo) -> str:
    keys = text.keys
    shares = keys.get(KV_HEADS, keys[HEADS]) != keys[HEADS]  # Vicuna's heads have keys of their own
    mistral = shares and (info.tiling is not None or keys.get(ROPE_BASE) == INSTRUCT_V2)
    likely = conversation({"model_type": "llava_mistral"} if mistral else {}, keys[TOKENS])
    return next(name for name, template in TEMPLATES.items() if template == likely)


def manifest(
    text: Header,
    vision: Header,
    info: MmprojInfo,
    how: Style,
    *,
    files: Mapping[str, FileRecord],
    source: Source,
    file_names: Mapping[str, str] | None = None,
    references: Mapping[str, Reference] | None = None,
) -> Manifest:
    """bundle.json of two files. files: their records; each has a name in the folder, or a reference."""
    keys = text.keys
    tokens = keys[TOKENS]
    return Manifest(
        version=__version__,
        source=source,
        types=Types(type_name(text.keys), type_name(vision.keys)),
        files=files,
        file_names=file_names or {},
        references=references or {},
        image_token=IMAGE_TOKEN,
        image_token_id=tokens.index(IMAGE_TOKEN) if IMAGE_TOKEN in tokens else None,
        n_patches=info.n_patches,
        vision_width=info.vision_width,
        projected_width=info.projected_width,
        space_prefix="every" if keys.get("tokenizer.ggml.add_space_prefix", True) else "none",
        eos_token_ids=_ends(text, how),
        preprocessing=Preprocessing(
            shortest_edge=info.image_size,
            crop_size=info.image_size,
            mean=_three(vision.keys["clip.vision.image_mean"], CLIP_MEAN),
            std=_three(vision.keys["clip.vision.image_std"], CLIP_STD),
            pad_to_square=how.pad,
            tiling=info.tiling,
        ),
        chat_template=how.template,
    )


def write_manifest(folder: Path, values: Manifest) -> None:
    """Write bundle.json. Raises ConvertError."""
    data = values.to_json()
    try:
        with atomic_write(folder / MANIFEST) as part:
            part.write_text(json.dumps(data, indent=2, ensure_ascii=bool(values.references)) + "\n", "utf-8")
    except OSError as error:
        raise ConvertError(f"{folder / MANIFEST}: cannot be written ({error.strerror or error})") from error


def _ends(text: Header, how: Style) -> tuple[int, ...]:
    """The file's end token, and the one that ends a turn in its template."""
    tokens = text.keys[TOKENS]
    turn = next((token for token in END_OF_TURN if token in how.template and token in tokens), None)
    ends = [text.keys.get(END, DEFAULT_END), *([tokens.index(turn)] if turn else [])]
    return tuple(dict.fromkeys(ends))


def _three(stored: list[float], exact: tuple[float, float, float]) -> tuple[float, float, float]:
    """CLIP's own numbers where the file holds them, which it does in float32."""
    r, g, b = exact if np.allclose(stored, exact, rtol=1e-6, atol=0) else stored
    return float(r), float(g), float(b)

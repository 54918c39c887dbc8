"""The original authors' checkpoints (LlavaLlamaForCausalLM, LlavaMistralForCausalLM), translated into the hub format.

Knows the original config.json, tensor names, conversation templates and image preparation
(github.com/haotian-liu/LLaVA: llava/model/builder.py, conversation.py, mm_utils.py) and the source of the vision
tower; the rest of a conversion is the same for every format.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from pocketllava.convert.read.shards import read_tensors
from pocketllava.convert.read.sources import SourceTensor, read_json
from pocketllava.errors import ConvertError, UnsupportedCheckpoint
from pocketllava.models.tiling import MERGE_TYPES

KINDS = {  # architecture or model_type -> text model
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
}
KNOWN_TOWER = "clip-vit-large-patch14-336"  # LLaVA-1.5's: LlavaConfig's own default, no need to ask the hub
KNOWN_TOWERS = (KNOWN_TOWER, "clip-vit-large-patch14")
HUB_OWNER = "openai/"
ANYRES = "anyres"  # image_aspect_ratio of LLaVA-1.6: pictures are cut into tiles
MAX_PINPOINT_CHARACTERS = 10_000  # of a list written as text
NOT_VISION = ("text_model.", "visual_projection.", "text_projection.", "logit_scale")

_MESSAGE = (
    "{% macro said(m) %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% endmacro %}"
)
VICUNA_V1 = (  # conv_vicuna_v1 with llava_v1's system line: sep " ", sep2 "</s>"
    _MESSAGE + "{% if messages[0]['role'] == 'system' %}{{ said(messages[0]) }}{% else %}"
    '{{ "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful,'
    " detailed, and polite answers to the human's questions.\" }}{% endif %}{{ ' ' }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + said(m) + ' ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + said(m) + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL_INSTRUCT = (  # conv_mistral_instruct: no system line, sep "", sep2 "</s>"
    _MESSAGE + "{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and messages[0]['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + said(messages[0]) + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ said(m) + ' [/INST]' }}{% else %}{{ ' ' + said(m) + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (  # conv_chatml_direct, llava-v1.6-34b's: no line break behind <|im_end|>
    _MESSAGE + "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nAnswer the questions.<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + said(m) + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# conv_llava_llama_3 through Meta's template. The original code puts a second <|begin_of_text|> before it when it
# asks, which it did not when it trained.
LLAMA_3 = (
    _MESSAGE + "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able"
    " to understand the visual content that the user provides, and assist the user with a variety of tasks using"
    " natural language.<|eot_id|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ said(m) | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BY_TOKEN = {
    "<|im_start|>": CHATML,
    "<|start_header_id|>": LLAMA_3,
}  # what only such a text model's vocabulary has
BY_KIND = {"llama": VICUNA_V1, "mistral": MISTRAL_INSTRUCT}


def conversation(config: Mapping[str, Any], tokens: Collection[str]) -> str:
    """The chat template of the text model that a checkpoint was trained from. tokens: its vocabulary."""
    by_token = next((template for token, template in BY_TOKEN.items() if token in tokens), None)
    return by_token or BY_KIND[text_kind(config) or "llama"]


def text_kind(config: Mapping[str, Any]) -> str | None:
    """ "llama" or "mistral" for a config.json of the original format, else None."""
    names = (*(config.get("architectures") or []), config.get("model_type"))
    kind = next((KINDS[str(n)] for n in names if str(n) in KINDS), None)
    flat = config.get("model_type") == "llava" and "mm_vision_tower" in config and "text_config" not in config
    return kind or ("llama" if flat and not config.get("architectures") else None)


def canonical(name: str) -> str | None:
    """The canonical name (checkpoint.py) of an original checkpoint's tensor, or None."""
    name = name.removeprefix("model.")
    if name == "image_newline":
        return "projector.image_newline"
    if name.startswith("mm_projector."):
        layers = {"0": "linear_1", "2": "linear_2"}
        number, _, rest = name.removeprefix("mm_projector.").partition(".")
        return f"projector.{layers[number]}.{rest}" if number in layers else None
    if name.startswith("vision_tower."):
        return "vision." + name.removeprefix("vision_tower.").removeprefix("vision_tower.").removeprefix(
            "vision_model."
        )
    text = ("layers.", "embed_tokens.", "norm.", "lm_head.")
    return "text." + name if name.startswith(text) else None


def hub_config(config: Mapping[str, Any], vision: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config.json that LlavaForConditionalGeneration or LlavaNextForConditionalGeneration has for the same model.

    vision: the tower's config, None for LLaVA-1.5's own. Raises UnsupportedCheckpoint.
    """
    _refuse(config)
    text = {k: v for k, v in config.items() if k not in ("architectures", "quantization_config")}
    hub = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**text, "model_type": text_kind(config)},
        "vision_config": dict(vision) if vision is not None else None,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "image_token_index": 1,  # any row: the prompt never holds it
    }
    if "quantization_config" in config:  # refused there, as every quantized checkpoint
        hub["quantization_config"] = config["quantization_config"]
    if config.get("image_aspect_ratio") == ANYRES:
        hub["architectures"], hub["model_type"] = ["LlavaNextForConditionalGeneration"], "llava_next"
        hub["image_grid_pinpoints"] = _heights_first(config.get("image_grid_pinpoints"))
    return hub


def merge_type(config: Mapping[str, Any]) -> str:
    """How tiles become one sequence (models/tiling.py); only where pictures are tiled."""
    return str(config.get("mm_patch_merge_type") or "flat")


def _heights_first(pinpoints: Any) -> list[Any]:
    """image_grid_pinpoints, a list or one written as text, as transformers has it.

    The list's order stays, which decides between resolutions that fit equally well. Raises UnsupportedCheckpoint.
    """
    sizes = _written(pinpoints) if isinstance(pinpoints, str) else pinpoints
    if not isinstance(sizes, list | tuple):
        raise UnsupportedCheckpoint(
            f"config.json: image_grid_pinpoints is {pinpoints!r:.80}, expected a list of [width, height] in pixels"
        )
    return [list(size)[::-1] if isinstance(size, list | tuple) else size for size in sizes]


def _written(text: str) -> Any:
    """A list written as text, such as "[(336, 672), (672, 336)]"; None for another form."""
    try:
        return ast.literal_eval(text) if len(text) <= MAX_PINPOINT_CHARACTERS else None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None


def _refuse(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedCheckpoint for settings of the original code that are not supported."""
    expected: dict[str, tuple[Any, tuple[Any, ...], str]] = {
        "mm_projector_type": ("linear", ("mlp2x_gelu",), "LLaVA-1.0's single linear layer is another model"),
        "mm_use_im_start_end": (False, (False, None), "LLaVA-1.5 and 1.6 have no image start and end tokens"),
        "mm_vision_select_feature": ("patch", ("patch",), "llama.cpp always drops the class token"),
        "mm_patch_merge_type": ("flat", (*MERGE_TYPES, None), "other ways to join tiles are not supported"),
        "image_aspect_ratio": (
            "square",
            (ANYRES, "pad", "square", None),
            "other ways to cut are not supported",
        ),
        "s2": (False, (False, None), "several scales of one image are not supported"),
    }
    for name, (default, accepted, reason) in expected.items():
        value = config.get(name, default)
        if value not in accepted:
            expected_values = ", ".join(repr(v) for v in accepted if v is not None)
            raise UnsupportedCheckpoint(
                f"config.json: {name} is {value!r}, expected {expected_values}; {reason}"
            )


def pads(config: Mapping[str, Any]) -> bool:
    """Whether images are padded to a square before CLIP's own steps (process_images)."""
    return config.get("image_aspect_ratio") == "pad"


def space_prefix(
    hub_prefix: str, tokenizer_config: Mapping[str, Any], described: bool, kind: str, dummy_prefix: bool
) -> str:
    """Which text gets a leading space (manifest.py): the original tokenizes each text between images by itself.

    Its Llama tokenizer is the slow one, whatever tokenizer.json says: with legacy=false only the start of such
    a text gets the space, otherwise every run between special tokens too, if tokenizer.model says so (dummy_prefix:
    Yi's does not).
    """
    if hub_prefix == "none" or (not described and tokenizer_config.get("add_prefix_space") is False):
        return "none"
    if kind == "llama" or not described:
        if tokenizer_config.get("legacy") is False:
            return "chunk"
        return "every" if dummy_prefix else "none"
    return "chunk" if hub_prefix == "first" else hub_prefix


def tower_source(config: Mapping[str, Any], folder: Path, given: str | None) -> str:
    """The folder or hub id of the vision tower: the one that the caller gives, or mm_vision_tower's.

    A checkpoint is a stranger's file: of what it names, only its own folders and OpenAI's two towers are opened.
    Raises ConvertError.
    """
    if given is not None:
        return given
    name = config.get("mm_vision_tower", config.get("vision_tower"))
    if not isinstance(name, str) or not name or "\0" in name:
        raise ConvertError(
            f"config.json: mm_vision_tower is {name!r}, expected a name; give --vision-tower FOLDER"
        )
    own = (folder / name).resolve()  # an absolute path stays what it is
    if own.is_relative_to(folder.resolve()) and own.is_dir():
        return str(own)
    last = PureWindowsPath(name).name  # often a path on the trainer's machine, which may be of any kind
    if last in KNOWN_TOWERS:
        return HUB_OWNER + last
    raise ConvertError(
        f"config.json: mm_vision_tower is {name!r}, expected {HUB_OWNER}{KNOWN_TOWER} or a folder of the checkpoint;"
        " nothing else is opened unasked: give --vision-tower FOLDER"
    )


def tower_config(folder: Path) -> dict[str, Any]:
    """The vision part of a CLIP folder's config.json. Raises UnsupportedCheckpoint for another tower."""
    if not (folder / "config.json").is_file():
        raise ConvertError(f"{folder}: no config.json, expected a CLIP model's folder for --vision-tower")
    config = read_json(folder / "config.json")
    part = config.get("vision_config") if config.get("model_type") == "clip" else config
    vision = {"model_type": "clip_vision_model", **part} if isinstance(part, dict) else {}
    if (
        config.get("model_type") not in ("clip", "clip_vision_model")
        or vision.get("model_type") != "clip_vision_model"
    ):
        raise UnsupportedCheckpoint(
            f"{folder / 'config.json'}: vision tower {config.get('model_type')!r}, expected 'clip' or"
            " 'clip_vision_model'"
        )
    return vision


def tower_tensors(folder: Path) -> tuple[dict[str, SourceTensor], dict[str, str]]:
    """(the vision tower's tensors by canonical name, reasons by the name of a tensor left out) of a CLIP folder."""
    tensors: dict[str, SourceTensor] = {}
    dropped: dict[str, str] = {}
    for tensor in read_tensors(folder).tensors:
        if tensor.name.startswith(NOT_VISION):
            dropped[tensor.name] = "not the vision tower's"
        elif tensor.name.endswith(".position_ids"):
            dropped[tensor.name] = "a constant that the runtime computes"
        else:
            tensors["vision." + tensor.name.removeprefix("vision_model.")] = tensor
    return tensors, dropped

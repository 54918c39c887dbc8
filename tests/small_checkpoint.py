"""Small LLaVA-1.5 and 1.6 checkpoints with random weights, in every layout that the converter accepts.

numpy only. The weights mean nothing; what the files hold, and every number computed from them, is real.
Widths are multiples of 256 so that K-quants are used, unless a test asks for others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import small_llama3
import small_pickle
import small_tokenizer

Row = tuple[str, tuple[int, ...], float, float]  # canonical name, shape, mean, standard deviation
IMAGE, PATCH = 336, 14
END = 2  # the end token's id
CLIP = "clip-vit-small"  # folder of the original layout's vision tower
CHAT_TEMPLATE = (  # llava-1.5-7b-hf's
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


LLAMA31 = {  # Llama-3.1-8B's
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # every published LLaVA-1.6's
MISTRAL_TEMPLATE = (  # llava-v1.6-mistral-7b-hf's
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + "
    "'\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% else %}{{ raise_exception('Only user and assistant roles are"
    " supported!') }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (  # llava-v1.6-34b-hf's
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Layout:
    """What a checkpoint looks like. naming: "old" (hub), "new" (>= 4.52) or "newest" (>= 5.6)."""

    naming: str = "old"
    dtype: str = "F16"
    shards: int = 1
    hidden: int = 256
    ffn: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    tied: bool = False
    kind: str = "llama"
    tokenizer_model: bool = True
    tokenizer_json: bool = True
    scheme: str = "prepend"
    seed: int = 0
    vision: int = 64
    vision_ffn: int = 160
    vision_layers: int = 3
    sparse_config: bool = False
    chatml: bool = False  # Yi-34B's kind of vocabulary and template
    inst: bool = False  # llava-v1.6-mistral-7b-hf's template
    theta: float = 1e4
    llama3: bool = False  # byte-level vocabulary, its template, rope theta 5e5
    rope: str = ""  # "llama3": Llama 3.1's rope_scaling
    siglip: bool = False
    feature_layer: int | tuple[int, ...] = -2
    weights: str = "safetensors"  # or "bin"
    tower: str = "inside"  # naming "original": "inside" the checkpoint, or a CLIP "folder" alone
    aspect: str = "pad"
    merge: str = "spatial_unpad"  # of the original layout
    image: int = IMAGE  # pixels of a CLIP tower's picture
    tiled: bool = False  # LLaVA-1.6: pictures in tiles, rows of patches that end with image_newline
    pinpoints: tuple[tuple[int, int], ...] = PINPOINTS  # (height, width), as transformers counts them
    endless: bool = False  # greedy answers never end: the end token's logit is 0, and another one is larger

    @property
    def vocab(self) -> int:
        """Rows of the embedding: all pieces, <image>, <pad>, then rows without a token."""
        return -(-(self.image_token + 2) // 64) * 64

    @property
    def image_token(self) -> int:
        """<image>; <pad> follows it."""
        return small_llama3.image_token() if self.llama3 else len(small_tokenizer.vocabulary(self.chatml))

    @property
    def end(self) -> int:
        """The end token's id: </s>, or Yi's <|im_end|>."""
        return small_tokenizer.IM_END if self.chatml else END

    @property
    def image_size(self) -> int:
        """Pixels: CLIP's 336, or SigLIP's 384, of which 27 patches use 378."""
        return 384 if self.siglip else self.image

    @property
    def n_feature_layers(self) -> int:
        """How many layers' features stand side by side."""
        return len(self.feature_layer) if isinstance(self.feature_layer, tuple) else 1


def write(folder: Path, layout: Layout | None = None, **changes: Any) -> Path:
    """Write a checkpoint; returns its folder."""
    layout = Layout(**changes) if layout is None else layout
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, layout)
    _write_configs(folder, layout)
    original = layout.naming == "original"
    if layout.llama3:
        small_llama3.write(folder, added=not original)
        return folder
    small_tokenizer.write(
        folder,
        added=not original,
        model=layout.tokenizer_model,
        described=layout.tokenizer_json,
        scheme=layout.scheme,
        chatml=layout.chatml,
    )
    return folder


def rows(c: Layout) -> Iterator[Row]:
    """Every tensor, under names that _named turns into a checkpoint's."""

    def linear(name: str, out: int, inp: int, bias: bool = True) -> Iterator[Row]:
        yield name + ".weight", (out, inp), 0, inp**-0.5
        if bias:
            yield name + ".bias", (out,), 0, 0.02

    def norm(name: str, width: int, bias: bool = True) -> Iterator[Row]:
        yield name + ".weight", (width,), 1, 0.05
        if bias:
            yield name + ".bias", (width,), 0, 0.05

    v = c.vision
    if c.siglip:
        yield "V.embeddings.patch_embedding.bias", (v,), 0, 0.1
        yield "V.head.probe", (1, 1, v), 0, 1.0
    else:
        yield "V.embeddings.class_embedding", (v,), 0, 0.5
    yield "V.embeddings.patch_embedding.weight", (v, 3, PATCH, PATCH), 0, (3 * PATCH**2) ** -0.5
    yield "V.embeddings.position_embedding.weight", ((c.image_size // PATCH) ** 2 + (not c.siglip), v), 0, 0.5
    if not c.siglip:
        yield from norm("V.pre_layrnorm", v)
    for n in range(c.vision_layers):
        block = f"V.encoder.layers.{n}."
        for p in "kvq":
            yield from linear(f"{block}self_attn.{p}_proj", v, v)
        yield from linear(block + "self_attn.out_proj", v, v)
        yield from norm(block + "layer_norm1", v)
        yield from linear(block + "mlp.fc1", c.vision_ffn, v)
        yield from linear(block + "mlp.fc2", v, c.vision_ffn)
        yield from norm(block + "layer_norm2", v)
    yield from norm("V.post_layernorm", v)
    yield from linear("P.linear_1", c.hidden, v * c.n_feature_layers)
    yield from linear("P.linear_2", c.hidden, c.hidden)
    yield "T.embed_tokens.weight", (c.vocab, c.hidden), 0, 1.0
    kv = c.hidden // c.heads * c.kv_heads
    for n in range(c.layers):
        block = f"T.layers.{n}."
        for p, out in (("q", c.hidden), ("k", kv), ("v", kv), ("o", c.hidden)):
            yield from linear(f"{block}self_attn.{p}_proj", out, c.hidden, bias=False)
        yield from linear(block + "mlp.gate_proj", c.ffn, c.hidden, bias=False)
        yield from linear(block + "mlp.up_proj", c.ffn, c.hidden, bias=False)
        yield from linear(block + "mlp.down_proj", c.hidden, c.ffn, bias=False)
        yield from norm(block + "input_layernorm", c.hidden, bias=False)
        yield from norm(block + "post_attention_layernorm", c.hidden, bias=False)
    yield from norm("T.norm", c.hidden, bias=False)
    if not c.tied:
        yield from linear("H", c.vocab, c.hidden, bias=False)
    if c.tiled:  # last, so that the other tensors are those of the same layout without tiles
        yield "N.image_newline", (c.hidden,), 0, 1.0


PREFIXES = {
    "old": {"V": "vision_tower.vision_model", "P": "multi_modal_projector", "T": "language_model.model",
            "H": "language_model.lm_head", "N": ""},
    "new": {"V": "model.vision_tower.vision_model", "P": "model.multi_modal_projector", "T": "model.language_model",
            "H": "lm_head", "N": "model"},
    "original": {"V": "model.vision_tower.vision_tower.vision_model", "P": "model.mm_projector", "T": "model",
                 "H": "lm_head", "N": "model"},
    "newest": {"V": "model.vision_tower", "P": "model.multi_modal_projector", "T": "model.language_model",
               "H": "lm_head", "N": "model"},
}  # fmt: skip


def _named(name: str, naming: str) -> str:
    part, dot, rest = name.partition(".")
    if naming == "original":
        rest = rest.replace("linear_1", "0").replace("linear_2", "2")
    return (PREFIXES[naming][part] + dot + rest).removeprefix(".")


def values(c: Layout) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Every tensor's values before they are rounded to the checkpoint's dtype."""
    rng = np.random.default_rng(c.seed)
    for name, shape, mean, std in rows(c):
        drawn = rng.standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean)
        if c.naming == "original" and name in ("T.embed_tokens.weight", "H.weight"):
            drawn = drawn[: c.image_token]  # no rows for <image>, <pad> and padding
        if c.endless and name == "H.weight":
            drawn[END] = 0
        yield _named(name, c.naming), drawn


def to_bytes(array: npt.NDArray[np.float32], dtype: str) -> bytes:
    """float32 -> F32, F16 or BF16 (to nearest even) bytes."""
    if dtype == "F16":
        return array.astype(np.float16).tobytes()
    if dtype == "BF16":
        bits = np.ascontiguousarray(array).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    return array.tobytes()


def write_safetensors(path: Path, tensors: list[tuple[str, str, tuple[int, ...], bytes]]) -> None:
    """(name, dtype, shape, bytes) -> one file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(t[3] for t in tensors))


def _write_weights(folder: Path, c: Layout) -> None:
    tensors = [(name, c.dtype, a.shape, to_bytes(a, c.dtype)) for name, a in values(c)]
    if c.naming == "original" and c.tower == "folder":
        prefix = "model.vision_tower.vision_tower."
        tower = [(n.removeprefix(prefix), *rest) for n, *rest in tensors if n.startswith(prefix)]
        text = ("text_model.final_layer_norm.weight", "F16", (4,), bytes(8))
        write_tensors(folder / CLIP, [*tower, text], replace(c, shards=1))
        tensors = [t for t in tensors if not t[0].startswith(prefix)]
    write_tensors(folder, tensors, c)


def write_tensors(folder: Path, tensors: list[tuple[str, str, tuple[int, ...], bytes]], c: Layout) -> None:
    """Weights in the layout's format: one file, or shards and their index."""
    folder.mkdir(exist_ok=True)
    stem, end, write_file = ("model", "safetensors", write_safetensors)
    if c.weights == "bin":
        stem, end, write_file = ("pytorch_model", "bin", small_pickle.write_bin)
    if c.shards == 1:
        write_file(folder / f"{stem}.{end}", tensors)
        return
    weight_map: dict[str, str] = {}
    step = -(-len(tensors) // c.shards)
    for k in range(c.shards):
        file, group = f"{stem}-{k + 1:05d}-of-{c.shards:05d}.{end}", tensors[k * step : (k + 1) * step]
        write_file(folder / file, group)
        weight_map |= {t[0]: file for t in group}
    index = {"metadata": {"total_size": sum(len(t[3]) for t in tensors)}, "weight_map": weight_map}
    dump(folder / f"{stem}.{end}.index.json", index)


def dump(path: Path, value: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _write_configs(folder: Path, c: Layout) -> None:
    torch_dtype = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[c.dtype]
    image_token = c.image_token
    text = {
        "model_type": c.kind,
        "hidden_size": c.hidden,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "vocab_size": c.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "torch_dtype": torch_dtype,
        "tie_word_embeddings": c.tied,
    }
    if not c.sparse_config:
        text |= {"rope_theta": c.theta, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": c.end}
    if c.kind == "mistral" and c.tiled:
        text["sliding_window"] = None
    if c.llama3:
        text |= {"rope_theta": 500000.0, **small_llama3.ends()}
    if c.rope == "llama3":
        text["rope_scaling"] = LLAMA31
    if c.naming == "original":
        _write_original_configs(folder, c, text, _vision(c))
        return
    dump(folder / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": image_token, "pad_token_id": image_token + 1, "projector_hidden_act": "gelu",
        "vision_feature_layer": list(c.feature_layer) if c.n_feature_layers > 1 else c.feature_layer,
        "vision_feature_select_strategy": "full" if c.siglip else "default", "tie_word_embeddings": c.tied,
        "torch_dtype": torch_dtype, "text_config": text,
        "vision_config": _vision(c), **(_tiling(c) if c.tiled else {}),
    })  # fmt: skip
    dump(folder / "preprocessor_config.json", _preprocessor(c))
    dump(folder / "processor_config.json", {
        "processor_class": "LlavaNextProcessor" if c.tiled else "LlavaProcessor", "image_token": "<image>", "patch_size": PATCH,
        "num_additional_image_tokens": 0 if c.siglip else 1,
        "vision_feature_select_strategy": "full" if c.siglip else "default",
    })  # fmt: skip
    ends = small_llama3.generation_ends() if c.llama3 else {"bos_token_id": 1, "eos_token_id": c.end}
    dump(folder / "generation_config.json", {**ends, "pad_token_id": image_token + 1})
    dump(folder / "chat_template.json", {"chat_template": _template(c)})


def _template(c: Layout) -> str:
    if c.llama3:
        return small_llama3.CHAT_TEMPLATE
    return CHATML_TEMPLATE if c.chatml else MISTRAL_TEMPLATE if c.inst else CHAT_TEMPLATE


def _vision(c: Layout) -> dict[str, Any]:
    shape = {
        "hidden_size": c.vision, "intermediate_size": c.vision_ffn, "num_hidden_layers": c.vision_layers,
        "num_attention_heads": 2, "image_size": c.image_size, "patch_size": PATCH,
    }  # fmt: skip
    if c.siglip:
        return {"model_type": "siglip_vision_model", **shape, "vision_use_head": False}
    return {"model_type": "clip_vision_model", **shape, "projection_dim": 32, "vocab_size": 32000}


def _tiling(c: Layout) -> dict[str, Any]:
    return {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next",
        "image_grid_pinpoints": [list(size) for size in c.pinpoints], "use_image_newline_parameter": True,
    }  # fmt: skip


def _preprocessor(c: Layout) -> dict[str, Any]:
    side = {"height": c.image_size, "width": c.image_size}
    tiled = {
        "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor", "do_pad": True,
        "aspect_ratio_setting": "anyres", "image_grid_pinpoints": [list(size) for size in c.pinpoints],
    }  # fmt: skip
    if c.siglip:
        return {
            "image_processor_type": "SiglipImageProcessor", "processor_class": "LlavaProcessor", "do_resize": True,
            "size": side, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "do_convert_rgb": None, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        }  # fmt: skip
    return {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"shortest_edge": c.image_size}, "resample": 3, "do_center_crop": True,
        "crop_size": side, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], **(tiled if c.tiled else {}),
    }  # fmt: skip


def _write_original_configs(folder: Path, c: Layout, text: dict[str, Any], vision: dict[str, Any]) -> None:
    """config.json as liuhaotian/llava-v1.5-7b has it, and a CLIPModel's folder beside the weights."""
    mistral = c.kind == "mistral"
    dump(folder / "config.json", {
        **text, "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "model_type": "llava_mistral" if mistral else "llava", "vocab_size": c.image_token,
        "freeze_mm_mlp_adapter": False, "image_aspect_ratio": c.aspect,
        "image_grid_pinpoints": [[w, h] for h, w in c.pinpoints] if c.tiled else None,
        **({"mm_patch_merge_type": c.merge} if c.tiled else {}),
        "mm_hidden_size": c.vision, "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": CLIP, "pad_token_id": 0,
        "tune_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True,
    })  # fmt: skip
    (folder / CLIP).mkdir(exist_ok=True)
    dump(folder / CLIP / "config.json", {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 32, "vision_config": vision,
        "text_config": {"model_type": "clip_text_model"},
    })  # fmt: skip
    if c.image != IMAGE:  # a tower of another size needs its processor's
        dump(folder / CLIP / "preprocessor_config.json", _preprocessor(replace(c, tiled=False)))
    ends = small_llama3.generation_ends() if c.llama3 else {"bos_token_id": 1, "eos_token_id": c.end}
    dump(folder / "generation_config.json", {**ends, "pad_token_id": 0})

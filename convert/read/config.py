"""config.json -> typed dimensions of both models, with transformers' defaults; unknown settings are refused by name.

Knows config.json of LlavaForConditionalGeneration and LlavaNextForConditionalGeneration; no tensor data, no GGUF.
Defaults are those of transformers' LlamaConfig, MistralConfig, CLIPVisionConfig, LlavaConfig and LlavaNextConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketllava.convert.read.rope import llama3_factors
from pocketllava.errors import ConvertError, UnsupportedCheckpoint
from pocketllava.models.preprocessing import PatchGrid
from pocketllava.models.siglip import ACTIVATIONS as SIGLIP_ACTIVATIONS
from pocketllava.models.siglip import DEFAULTS as SIGLIP_DEFAULTS
from pocketllava.models.siglip import MODEL_TYPE as SIGLIP
from pocketllava.models.siglip import check_strategy
from pocketllava.models.tiling import NEXT_PINPOINTS, UNPAD, Tiling, tiling

TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8},
}
ALL_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MISTRAL_WINDOW = 4096
CLIP_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
ARCHITECTURES = {  # model_type -> architecture
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}
LLAVA_CLIP: dict[str, Any] = {  # LlavaConfig's vision tower when config.json has no vision_config
    **CLIP_DEFAULTS,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


@dataclass(frozen=True)
class TextConfig:
    """A Llama or Mistral decoder. rope_scale is the factor of linear position interpolation, 1.0 for none.

    rope_factors: Llama 3.1's divisors of the rotary frequencies, empty for none.
    """

    kind: str
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx: int
    rms_eps: float
    rope_theta: float
    rope_scale: float
    tied: bool
    bos_id: int
    eos_ids: tuple[int, ...]
    rope_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class VisionConfig(PatchGrid):
    """A CLIP or SigLIP tower of which the first n_used blocks run (hidden_states[n_used] are features).

    layers: the indices into hidden_states whose features are concatenated, in the checkpoint's order; n_used is the
    largest. class_token: CLIP; without it a SigLIP tower (patch bias, no norm before blocks).
    """

    n_embd: int
    n_ff: int
    n_layer: int
    n_used: int
    n_head: int
    projection_dim: int
    quick_gelu: bool
    eps: float
    layers: tuple[int, ...] = ()
    class_token: bool = True

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers in llama.cpp's order, ascending."""
        return tuple(sorted(self.layers)) or (self.n_used,)

    @property
    def layer_order(self) -> tuple[int, ...]:
        """For each of feature_layers its index in the checkpoint's order."""
        return tuple(self.layers.index(n) for n in self.feature_layers) if self.layers else (0,)

    @property
    def n_features(self) -> int:
        """Width of the projector's input."""
        return len(self.feature_layers) * self.n_embd


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA model: vision tower, two-layer GELU projector, text model. tiling: of LLaVA-1.6."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    tiling: Tiling | None = None

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> LlavaConfig:
        """Read config.json's content. Raises UnsupportedCheckpoint or ConvertError, naming the value."""
        _refuse_other_architectures(config)
        text, vision = _text(config), _vision(config)
        image_token_id = _whole(config, ("image_token_index", "image_token_id"), 32000)
        if config.get("model_type") != "llava_next":
            return cls(text, vision, image_token_id)
        pinpoints = config.get("image_grid_pinpoints")
        pinpoints = NEXT_PINPOINTS if pinpoints is None else pinpoints
        tiles = tiling(pinpoints, UNPAD, vision.image_size, height_first=True)
        return cls(text, vision, image_token_id, tiles)


def _refuse_other_architectures(config: Mapping[str, Any]) -> None:
    kind = str(config.get("model_type"))
    architectures = ", ".join(map(str, config.get("architectures") or [])) or kind
    if "quantization_config" in config or "quantization_config" in (config.get("text_config") or {}):
        method = (config.get("quantization_config") or {}).get("quant_method", "unknown method")
        raise UnsupportedCheckpoint(
            f"config.json: the checkpoint is already quantized ({method}); convert the F16 or BF16 original"
        )
    expected = ARCHITECTURES.get(kind)
    if expected is None or (expected not in architectures and architectures != kind):
        raise UnsupportedCheckpoint(
            f"config.json: found {architectures} (model_type {kind!r}), expected LlavaForConditionalGeneration"
            " (model_type 'llava') or LlavaNextForConditionalGeneration ('llava_next'); pocketllava converts LLaVA-1.5"
            " and LLaVA-1.6"
        )
    act = config.get("projector_hidden_act", "gelu")
    if act != "gelu":
        raise UnsupportedCheckpoint(f"config.json: projector_hidden_act {act!r}, expected 'gelu'")
    if config.get("multimodal_projector_bias") is False:
        raise UnsupportedCheckpoint(
            "config.json: multimodal_projector_bias false, expected a projector with biases"
        )
    check_strategy(config)


def _text(config: Mapping[str, Any]) -> TextConfig:
    given = config.get("text_config") or {}
    kind = str(given.get("model_type", "llama"))
    if kind not in TEXT_DEFAULTS:
        raise UnsupportedCheckpoint(
            f"config.json: text model {kind!r}, expected one of {', '.join(TEXT_DEFAULTS)}"
        )
    t = {**ALL_TEXT_DEFAULTS, **TEXT_DEFAULTS[kind], **{k: v for k, v in given.items() if v is not None}}
    _expect(t.get("hidden_act", "silu") == "silu", "hidden_act", t.get("hidden_act"), "'silu'")
    for bias in ("attention_bias", "mlp_bias"):
        _expect(not t.get(bias), bias, t.get(bias), "false")
    n_embd, n_head = _whole(t, ("hidden_size",)), _whole(t, ("num_attention_heads",))
    theta, scale = _rope(t)
    n_ctx = _whole(t, ("max_position_embeddings",))
    # MistralConfig's default, which Mistral-7B-Instruct-v0.2 sets to null
    if window := given.get("sliding_window", MISTRAL_WINDOW if kind == "mistral" else None):
        # llama.cpp's llama has no window: stay inside it, where both agree
        n_ctx = min(n_ctx, _whole({"sliding_window": window}, ("sliding_window",)))
    head_dim = _whole(t, ("head_dim",), n_embd // n_head)
    n_head_kv = _whole(t, ("num_key_value_heads",), n_head)
    _expect(n_head % n_head_kv == 0, "num_key_value_heads", n_head_kv, f"a divisor of {n_head} heads")
    _expect(head_dim % 2 == 0, "head_dim", head_dim, "an even number")
    eos = t["eos_token_id"]
    return TextConfig(
        kind=kind,
        n_embd=n_embd,
        n_ff=_whole(t, ("intermediate_size",)),
        n_layer=_whole(t, ("num_hidden_layers",)),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=_whole(t, ("vocab_size",)),
        n_ctx=n_ctx,
        rms_eps=_number(t, "rms_norm_eps"),
        rope_theta=theta,
        rope_scale=scale,
        tied=bool(config.get("tie_word_embeddings") or given.get("tie_word_embeddings")),
        bos_id=int(t["bos_token_id"]),
        eos_ids=tuple(eos) if isinstance(eos, list) else (int(eos),),
        rope_factors=llama3_factors(_rope_of(t), theta, head_dim) if _rope_kind(t) == "llama3" else (),
    )


def _rope_of(t: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` (transformers 5) or `rope_scaling`."""
    return {**(t.get("rope_scaling") or {}), **(t.get("rope_parameters") or {})}


def _rope_kind(t: Mapping[str, Any]) -> str:
    rope = _rope_of(t)
    return str(rope.get("rope_type", rope.get("type", "default")))


def _rope(t: Mapping[str, Any]) -> tuple[float, float]:
    """(theta, linear scale) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    rope, kind = _rope_of(t), _rope_kind(t)
    theta = float(rope.get("rope_theta", t.get("rope_theta", 10000.0)))
    if kind in ("default", "llama3"):
        return theta, 1.0
    if kind == "linear":
        return theta, float(rope["factor"])
    raise UnsupportedCheckpoint(f"config.json: rope_type {kind!r}, expected 'default', 'linear' or 'llama3'")


def _vision(config: Mapping[str, Any]) -> VisionConfig:
    given = config.get("vision_config")
    kind = str((given or {}).get("model_type", "clip_vision_model"))
    if kind not in ("clip_vision_model", SIGLIP):
        raise UnsupportedCheckpoint(
            f"config.json: vision tower {kind!r}, expected 'clip_vision_model' or {SIGLIP!r}"
        )
    is_clip = kind != SIGLIP
    defaults = CLIP_DEFAULTS if is_clip else SIGLIP_DEFAULTS
    v = {**defaults, **{k: x for k, x in given.items() if x is not None}} if given else LLAVA_CLIP
    known = ("quick_gelu", "gelu") if is_clip else SIGLIP_ACTIVATIONS
    _expect(v["hidden_act"] in known, "hidden_act", v["hidden_act"], " or ".join(map(repr, known)))
    _expect(v.get("num_channels", 3) == 3, "num_channels", v.get("num_channels"), "3")
    n_layer, n_embd = _whole(v, ("num_hidden_layers",)), _whole(v, ("hidden_size",))
    image_size, patch_size = _whole(v, ("image_size",)), _whole(v, ("patch_size",))
    n_head = _whole(v, ("num_attention_heads",))
    _expect(n_embd % n_head == 0, "num_attention_heads", n_head, f"a divisor of hidden_size {n_embd}")
    _expect(
        image_size % patch_size == 0 or (not is_clip and image_size > patch_size),  # SigLIP: 384 = 27 * 14 + 6
        "patch_size", patch_size, f"a divisor of image_size {image_size}",
    )  # fmt: skip
    layers = _feature_layers(config.get("vision_feature_layer", -2), n_layer)
    return VisionConfig(
        n_embd=n_embd,
        n_ff=_whole(v, ("intermediate_size",)),
        n_layer=n_layer,
        n_used=max(layers),
        n_head=n_head,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=_whole(v, ("projection_dim",)),
        quick_gelu=v["hidden_act"] == "quick_gelu",
        eps=_number(v, "layer_norm_eps"),
        layers=layers,
        class_token=is_clip,
    )


def _feature_layers(given: Any, n_layer: int) -> tuple[int, ...]:
    """vision_feature_layer -> indices into hidden_states, in the same order: [-2, -5] of 24 layers is (23, 20).

    transformers counts n_layer + 1 hidden states, negative from the end. Raises UnsupportedCheckpoint.
    """
    listed = given if isinstance(given, list) else [given]
    if not listed or any(not isinstance(n, int) or isinstance(n, bool) for n in listed):
        raise UnsupportedCheckpoint(
            f"config.json: vision_feature_layer {given!r}, expected a whole number or a list of them"
        )
    layers = tuple(n if n >= 0 else n_layer + 1 + n for n in listed)
    if min(layers) < 0 or not 1 <= max(layers) <= n_layer:
        raise UnsupportedCheckpoint(
            f"config.json: vision_feature_layer is {given!r}, expected one of {n_layer} blocks"
        )
    if len(set(layers)) != len(layers):
        raise UnsupportedCheckpoint(
            f"config.json: vision_feature_layer {given!r} names a layer twice, expected each once"
            " (llama.cpp stacks each once)"
        )
    return layers


def _whole(data: Mapping[str, Any], names: tuple[str, ...], default: int | None = None) -> int:
    value = next((data[n] for n in names if data.get(n) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise ConvertError(f"config.json: {names[0]} is {value!r}, expected a positive whole number")
    return value


def _number(data: Mapping[str, Any], name: str) -> float:
    value = data[name]
    if not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ConvertError(f"config.json: {name} is {value!r}, expected a small positive number")
    return float(value)


def _expect(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise UnsupportedCheckpoint(f"config.json: {name} is {value!r}, expected {expected}")

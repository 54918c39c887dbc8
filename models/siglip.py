"""SigLIP towers in a LLaVA checkpoint: defaults of SiglipVisionConfig and SiglipImageProcessor, and what is refused.

Knows JSON content only. Such a tower has no class token and no norm before its blocks, a bias on its patches
and the tanh GELU; its features are all patches (`vision_feature_select_strategy` "full").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketllava.errors import UnsupportedCheckpoint

MODEL_TYPE = "siglip_vision_model"
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "projection_dim": 512,  # SigLIP has none; mmproj files carry the text model's width
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
ACTIVATIONS = ("gelu_pytorch_tanh",)
MEAN = STD = (0.5, 0.5, 0.5)


def is_siglip(config: Mapping[str, Any]) -> bool:
    """Whether config.json names a SigLIP tower."""
    vision = config.get("vision_config")
    return isinstance(vision, Mapping) and vision.get("model_type") == MODEL_TYPE


def check_strategy(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedCheckpoint unless the features are what llama.cpp gives: all patches, no class token.

    A CLIP tower's class token is always dropped there ("default"), and no SigLIP patch is ("full").
    """
    strategy = config.get("vision_feature_select_strategy", "default")
    expected, why = "default", "llama.cpp always drops the class token"
    if is_siglip(config):
        expected, why = "full", "SigLIP has no class token, and llama.cpp drops no patch"
    if strategy != expected:
        raise UnsupportedCheckpoint(
            f"config.json: vision_feature_select_strategy {strategy!r}, expected {expected!r} ({why})"
        )


def image_processor(given: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """SiglipImageProcessor's settings in the terms of CLIPImageProcessor: a resize to a square, no crop."""
    side = {"height": image_size, "width": image_size}
    defaults = {"size": side, "resample": 3, "image_mean": MEAN, "image_std": STD}
    settings = {name: value for name, value in given.items() if value is not None}
    return {**defaults, **settings, "do_center_crop": True, "crop_size": side}

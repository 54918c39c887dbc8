"""config.json as checkpoints on the hub have it: sparse, with transformers' defaults meant."""

from __future__ import annotations

from typing import Any

import pytest

from pocketllava import ConvertError, UnsupportedCheckpoint
from pocketllava.convert.read.config import LlavaConfig
from pocketllava.models.preprocessing import Preprocessing, preprocessing

HUB_7B: dict[str, Any] = {  # llava-hf/llava-1.5-7b-hf, whole
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


def test_the_hubs_sparse_config() -> None:
    c = LlavaConfig.from_json(HUB_7B)
    assert (c.text.n_embd, c.text.n_ff, c.text.n_layer, c.text.n_head, c.text.n_head_kv) == (
        4096,
        11008,
        32,
        32,
        32,
    )
    assert (c.text.rms_eps, c.text.rope_theta, c.text.n_ctx, c.text.n_vocab) == (1e-5, 1e4, 4096, 32064)
    assert (c.vision.n_used, c.vision.n_patches, c.vision.quick_gelu, c.vision.eps) == (23, 576, True, 1e-5)
    assert c.image_token_id == 32000


def test_defaults_where_a_part_is_missing() -> None:
    bare = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    c = LlavaConfig.from_json(bare)
    assert (c.text.n_ctx, c.text.rms_eps) == (2048, 1e-6)
    assert (c.vision.n_embd, c.vision.image_size, c.vision.patch_size) == (1024, 336, 14)
    mistral = LlavaConfig.from_json(
        {**bare, "text_config": {"model_type": "mistral", "sliding_window": 4096}}
    )
    assert (mistral.text.n_head_kv, mistral.text.n_ff, mistral.text.n_ctx) == (8, 14336, 4096)
    clip = LlavaConfig.from_json(
        {**bare, "vision_config": {"model_type": "clip_vision_model", "patch_size": 28}}
    )
    assert (clip.vision.n_embd, clip.vision.image_size, clip.vision.n_patches) == (768, 224, 64)


def test_names_of_transformers_5() -> None:
    text = {
        **HUB_7B["text_config"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "dtype": "float16",
    }
    c = LlavaConfig.from_json({**HUB_7B, "text_config": text, "image_token_id": 7, "image_token_index": None})
    assert (c.text.rope_theta, c.image_token_id) == (5e5, 7)
    text["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert LlavaConfig.from_json({**HUB_7B, "text_config": text}).text.rope_scale == 2.0


@pytest.mark.parametrize(("layer", "used"), [(-2, 23), (-1, 24), (23, 23), ([-2], 23), (-24, 1)])
def test_which_hidden_state_is_meant(layer: Any, used: int) -> None:
    assert LlavaConfig.from_json({**HUB_7B, "vision_feature_layer": layer}).vision.n_used == used


def test_preprocessing_lies_in_either_file() -> None:
    p = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 336},
        "crop_size": 336,
        "resample": 3,
    }
    assert preprocessing({"preprocessor_config.json": p}, 336) == Preprocessing()
    assert preprocessing({"processor_config.json": {"image_processor": p}}, 336) == Preprocessing()
    assert preprocessing({}, 336) == Preprocessing()
    squeezed = preprocessing({"preprocessor_config.json": {**p, "size": {"height": 336, "width": 336}}}, 336)
    assert squeezed.shortest_edge is None
    for wrong in (
        {"do_resize": False},
        {"rescale_factor": 1.0},
        {"size": {"height": 1, "width": 2}},
        {"size": {"shortest_edge": "336"}},
        {"resample": 9},
    ):
        with pytest.raises(UnsupportedCheckpoint, match=r"^preprocessor: "):
            preprocessing({"preprocessor_config.json": {**p, **wrong}}, 336)
    for std in ([0.3, 0.0, 0.3], [0.3, 0.3], [0.3, float("nan"), 0.3]):
        with pytest.raises(ConvertError, match="expected three positive numbers"):
            preprocessing({"preprocessor_config.json": {**p, "image_std": std}}, 336)

"""The demo LLaVA's geometry, initialization and checkpoint folder; knows nothing of scenes or training."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from training import vocabulary

IMAGE_SIDE = 336  # pixels
WIDTH = 192  # of the tower
N_PATCHES = (IMAGE_SIDE // vocabulary.PATCH) ** 2  # 36
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def config() -> LlavaConfig:
    """7.5 M parameters: vision 192 x 5 layers of which 4 are read, text 256 x 4 layers."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=576, num_hidden_layers=5, num_attention_heads=3, projection_dim=WIDTH,
        image_size=IMAGE_SIDE, patch_size=vocabulary.PATCH, hidden_act="quick_gelu",
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=vocabulary.PIECES + 2, max_position_embeddings=2048, rms_norm_eps=1e-5, bos_token_id=1,
        eos_token_id=2, pad_token_id=vocabulary.PAD_ID, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary.IMAGE_ID, image_seq_length=N_PATCHES,
        vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu",
        pad_token_id=vocabulary.PAD_ID, tie_word_embeddings=False,  # type: ignore[call-arg]
    )  # fmt: skip


def build(seed: int) -> LlavaForConditionalGeneration:
    """A model with fresh weights; linear layers start at 1 / sqrt(inputs), wider than transformers' 0.02."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
            weight.data.mul_(0.5)
    filters = model.model.vision_tower.embeddings.patch_embedding.weight
    filters.requires_grad_(False).copy_(cosines())  # kept: steps that suit other weights shake 9,408 inputs
    model.set_attn_implementation(
        {"vision_config": "eager"}
    )  # on a CPU six times quicker than sdpa for 37 tokens
    return model


def cosines() -> Tensor:
    """Filters (192, 3, 56, 56) to start from: each color's 64 lowest cosines, so that shapes show at once.

    Noise would do worse than nothing: 9,408 inputs see a stroke as well as a grain.
    """
    at = torch.arange(vocabulary.PATCH) + 0.5
    waves = torch.cos(torch.pi / vocabulary.PATCH * at * torch.arange(12)[:, None])  # (12, 56)
    lowest = sorted(((u, v) for u in range(12) for v in range(12)), key=lambda f: (f[0] + f[1], f))[:64]
    planes = torch.stack([torch.outer(waves[u], waves[v]) * (1 + 5 * (u + v)) for u, v in lowest])
    planes /= vocabulary.PATCH**2
    filters = torch.zeros(64, 3, 3, vocabulary.PATCH, vocabulary.PATCH)
    for color in range(3):
        filters[:, color, color] = planes
    return filters.flatten(0, 1)


def vision_features(model: LlavaForConditionalGeneration, pictures: Tensor) -> Tensor:
    """hidden_states[-2] without the class token, (n, 36, 192), of uint8 pictures (n, 336, 336, 3)."""
    mean, std = (torch.tensor(v, device=pictures.device) * 255 for v in (MEAN, STD))
    kind = torch.bfloat16 if torch.is_autocast_enabled(pictures.device.type) else torch.float32
    pixels = pictures.to(kind).sub_(mean).div_(std).permute(0, 3, 1, 2)  # in place: this is memory-bound
    tower = model.model.vision_tower
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        x = layer(x, attention_mask=None)
        x = x[0] if isinstance(x, tuple) else x
    found: Tensor = x[:, 1:]
    return found


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """The folder as transformers saves it, weights in F16; the model itself stays as it is."""
    half = LlavaForConditionalGeneration(model.config).half()  # type: ignore[no-untyped-call]
    half.load_state_dict(model.state_dict())
    half.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=vocabulary.PAD_ID)
    half.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written 0600, and goes into a wheel
    vocabulary.write(folder)

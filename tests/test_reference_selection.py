"""What SCOPE's selection reads and keeps, against the same formula on transformers' own float32 tensors."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pictures
import pytest
import recorded
from PIL import Image, ImageOps

from pocketllava import Llava
from pocketllava.vision.class_token import ClassTokenCorrection

FILE = recorded.FOLDER / "selection.json"
COUNTS = (192, 128, 64)
# Of the larger gain: two patches whose order rounding may turn. An F32 tower is 4.6e-4 off the reference (ggml's GELU
# tables and its F16 pixels, benchmarks/README.md), in attention and in each similarity.
NEAR = 5e-3
N_PATCHES = 576


def gains(attention: Any, similarity: Any, picked: list[int]) -> Any:
    """The formula as it is written, float64: what each patch would add to those picked, (n_patches,)."""
    covered = similarity[picked].max(axis=0, initial=0)
    values = attention * np.maximum(0, similarity - covered[:, None]).sum(axis=0)
    values[picked] = -1
    return values


def orders(attention: Any, hidden: Any, n: int) -> tuple[list[int], Any]:
    """The n best patches, best first, and the similarity that they were chosen by."""
    unit = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    similarity, order = unit @ unit.T, []
    for _ in range(n):
        order.append(int(np.argmax(gains(attention, similarity, order))))
    return order, similarity


def near_ties(found: list[int], attention: Any, similarity: Any) -> list[dict[str, Any]]:
    """Where our order takes another patch than the formula would after the same picks, with both gains.

    Raises AssertionError where they are no near tie.
    """
    listed = []
    for at, patch in enumerate(found):
        values = gains(attention, similarity, found[:at])
        best = int(np.argmax(values))
        if patch != best:
            gap = float((values[best] - values[patch]) / values[best])
            assert gap <= NEAR, f"pick {at}: patch {patch} instead of {best}, gap {gap:.2e}"
            listed.append({"pick": at, "ours": patch, "reference": best, "gap": float(f"{gap:.1e}")})
    return listed


@pytest.mark.reference
def test_attention_and_kept_patches(
    make_checkpoint: Any, make_bundle: Any, request: pytest.FixtureRequest
) -> None:
    import torch
    from transformers import LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    layout = {"dtype": "F32", "seed": 5}
    folder, bundle = make_checkpoint(**layout), make_bundle("F32", "F32", **layout)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor, kept, ties = CLIPImageProcessorPil.from_pretrained(folder), {}, {}
    tower = model.model.vision_tower
    with Llava.load(bundle.folder) as llava, llava.session() as session:
        for name, data in pictures.twelve().items():
            picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                out = tower(pixels, output_hidden_states=True, output_attentions=True)
            attention = out.attentions[-2][0, :, 0, 1:].sum(axis=0).numpy()
            hidden = out.hidden_states[-2][0, 1:].numpy().astype(np.float64)
            prepared = session.images.process(data)
            _, order = session.vision.encode_ranked(prepared.tiles[0], (0, 24, 0, 24))
            correction = session.vision.correction
            assert isinstance(correction, ClassTokenCorrection)
            heads = len(out.attentions[-2][0])
            assert np.abs(correction.attention() - attention).max() / heads <= 1e-4, name
            expected, similarity = orders(attention.astype(np.float64), hidden, max(COUNTS))
            found = order[: max(COUNTS)].tolist()
            ties[name] = near_ties(found, attention.astype(np.float64), similarity)
            kept[name] = {str(n): sorted(expected[:n]) for n in COUNTS}
            for n in COUNTS:
                different = set(found[:n]) ^ set(expected[:n])
                assert not different or ties[name], (name, n, different)
                print(f"{name}, {n}: {n - len(different) // 2} of {n} patches the same")
    print(json.dumps({name: listed for name, listed in ties.items() if listed}))
    if request.config.getoption("--record"):
        FILE.write_text(json.dumps({"kept": kept, "near ties": ties}) + "\n", "utf-8")
    assert kept == recorded.load(FILE)["kept"]

"""LLaVA-1.6: tiles, counts, features and answers, held to transformers' recorded results."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pictures
import pytest
import recorded
import tiled

from pocketllava import Llava
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.prompt.items import ImageSpan
from pocketllava.vision.image_processor import ImageProcessor


def digests(pinpoints: tuple[tuple[int, int], ...]) -> dict[str, str]:
    """SHA-256 of each picture's tiles, one behind the other."""
    processor = ImageProcessor(Preprocessing(tiling=tiled.tiling_of(pinpoints)), grid=24)
    return {
        name: hashlib.sha256(np.stack(processor.process(data).tiles).tobytes()).hexdigest()
        for name, data in pictures.twelve().items()
    }


@pytest.mark.parametrize("name", tiled.PINPOINT_SETS)
def test_token_counts_are_those_of_transformers(name: str) -> None:
    tiling = tiled.tiling_of(tiled.PINPOINT_SETS[name])
    counts = [tiling.layout(size, 336, 24).n_tokens for size in tiled.sizes()]
    assert counts == tiled.load()[f"token counts, {name}"]
    assert max(counts) <= tiling.most_tokens(336, 24)


@pytest.mark.parametrize("name", tiled.PINPOINT_SETS)
def test_tiles_have_the_pixels_of_transformers(name: str) -> None:
    assert digests(tiled.PINPOINT_SETS[name]) == tiled.load()[f"pixels, {name}"]


@pytest.mark.parametrize("name", tiled.LAYOUTS)
def test_prompts_and_answers_are_those_of_transformers(make_bundle: Any, name: str) -> None:
    reference = tiled.load()
    answers, ties, prompts = (reference[f"{part}, {name}"] for part in ("answers", "ties", "prompts"))
    with Llava.load(make_bundle("F16", "F16", **tiled.LAYOUTS[name]).folder) as llava:
        for case, turns in tiled.CONVERSATIONS.items():
            conversation = tiled.messages(turns)
            with llava.session() as session:
                items, image_id = session.count(conversation), session.image_id
            ids = [
                i
                for item in items
                for i in ([image_id] * item.n_tokens if isinstance(item, ImageSpan) else [item])
            ]
            assert ids == [int(i) for i in prompts[case].split()], case
            answer = llava.chat(conversation, max_tokens=tiled.N_TOKENS)
            assert answer.usage.prompt_tokens == len(ids)
            recorded.assert_equal_or_tie(list(answer.token_ids), answers[case], ties[case])


def test_features_are_those_of_transformers(make_bundle: Any) -> None:
    with Llava.load(make_bundle("F16", "F16", **tiled.LAYOUTS["Vicuna"]).folder) as llava:
        features = llava.image_features(pictures.twelve()["landscape"])
    assert recorded.relative_error(features[tiled.FEATURE_ROWS], tiled.features()) <= 1e-3

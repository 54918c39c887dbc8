"""LLaVA-1.6 against transformers in float32, computed here and now."""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import recorded
import tiled
from test_original import CONVERSATIONS
from test_reference import opened
from test_tiled import digests
from test_tiled_convert import chatml

from pocketllava import Llava, Message

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


IMAGE = pictures.png(pictures.scene(60, 60))


def judge(request: pytest.FixtureRequest, name: str, value: Any) -> None:
    """Hold the recording to what transformers gives now, or write it."""
    if request.config.getoption("--record"):
        packages = ("transformers", "torch", "tokenizers", "pillow", "numpy", "llama-cpp-python")
        tiled.keep("versions", {p: importlib.metadata.version(p) for p in packages})
        tiled.keep(name, value)
    assert tiled.load()[name] == value, f"recording of {name} is stale: pytest -m reference --record"


def image_processor(**changes: Any) -> Any:
    """Pillow's; the default one, torchvision's, resizes in another way."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    side = {"height": 336, "width": 336}  # its own default is 224
    return LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size=side, **changes)


def processor_of(folder: Path) -> Any:
    """transformers' processor with Pillow's image processor."""
    from transformers import AutoTokenizer, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    whole = LlavaNextProcessor.from_pretrained(folder)
    images = LlavaNextImageProcessorPil.from_pretrained(folder)
    return LlavaNextProcessor(
        images, AutoTokenizer.from_pretrained(folder), whole.patch_size, whole.vision_feature_select_strategy,
        whole.chat_template, num_additional_image_tokens=whole.num_additional_image_tokens,
    )  # fmt: skip


def model_of(folder: Path) -> Any:
    """transformers' model in float32."""
    import torch
    from transformers import LlavaNextForConditionalGeneration

    return LlavaNextForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("name", tiled.PINPOINT_SETS)
def test_token_counts(make_checkpoint: Any, name: str, request: pytest.FixtureRequest) -> None:
    """The processor's counts, and what the model's own unpad_image leaves."""
    import torch
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    pinpoints = [list(size) for size in tiled.PINPOINT_SETS[name]]
    processor = processor_of(make_checkpoint(tiled=True, pinpoints=tiled.PINPOINT_SETS[name]))
    sizes = [(height, width) for width, height in tiled.sizes()]
    count_tokens = getattr(processor, "_get_num_multimodal_tokens")  # noqa: B009  what transformers' own server calls
    counts = count_tokens(image_sizes=sizes)["num_image_tokens"]
    for size, count in zip(sizes, counts, strict=True):
        height, width = select_best_resolution(size, pinpoints)
        grid = unpad_image(torch.zeros(1, height // 14, width // 14), size)
        assert 576 + grid.shape[1] * (grid.shape[2] + 1) == count, size
    judge(request, f"token counts, {name}", counts)


def test_pixels(request: pytest.FixtureRequest) -> None:
    for name, pinpoints in tiled.PINPOINT_SETS.items():
        processor = image_processor(image_grid_pinpoints=[list(size) for size in pinpoints])
        expected = {}
        for picture, data in tiled.many().items():
            values = processor(opened(data), do_rescale=False, do_normalize=False, return_tensors="np")
            pixels = np.ascontiguousarray(np.moveaxis(values["pixel_values"][0], 1, -1).astype(np.uint8))
            expected[picture] = hashlib.sha256(pixels.tobytes()).hexdigest()
        assert digests(pinpoints) == expected
        judge(request, f"pixels, {name}", expected)


@pytest.mark.parametrize("name", tiled.LAYOUTS)
def test_features_prompts_and_answers(
    make_checkpoint: Any, make_bundle: Any, name: str, request: pytest.FixtureRequest
) -> None:
    import torch

    layout = tiled.LAYOUTS[name]
    folder, bundle = make_checkpoint(**layout), make_bundle("F16", "F16", **layout)
    model, processor = model_of(folder), processor_of(folder)
    answers, ties, prompts, data = {}, {}, {}, pictures.twelve()
    total = equal = 0
    with Llava.load(bundle.folder) as llava:
        for picture in ("landscape", "portrait", "wide"):
            inputs = processor.image_processor(opened(data[picture]), return_tensors="pt")
            with torch.no_grad():
                expected = np.asarray(model.model.get_image_features(**inputs).pooler_output[0])
            error = recorded.relative_error(llava.image_features(data[picture]), expected)
            print(f"\n{name}, {picture}: {len(expected)} tokens, relative error {error:.2e}")
            assert error <= 1e-3
            if (name, picture) == ("Vicuna", "landscape") and request.config.getoption("--record"):
                np.save(tiled.FEATURES_FILE, expected[tiled.FEATURE_ROWS])
        for case, turns in tiled.CONVERSATIONS.items():
            text = processor.apply_chat_template(tiled.for_transformers(turns), add_generation_prompt=True)
            begins = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
            images = [opened(data[picture]) for *_, names in turns for picture in names]
            inputs = processor(images=images, text=text, return_tensors="pt", add_special_tokens=not begins)
            with torch.no_grad():
                out = model.generate(
                    **inputs, max_new_tokens=tiled.N_TOKENS, do_sample=False, output_logits=True,
                    return_dict_in_generate=True,
                )  # fmt: skip
            ids = inputs["input_ids"][0].tolist()
            wanted = out.sequences[0, len(ids) :].tolist()
            ends = bundle.manifest.eos_token_ids
            answers[case] = wanted[: next((n for n, i in enumerate(wanted) if i in ends), len(wanted))]
            ties[case] = recorded.ties_of([np.asarray(step[0]) for step in out.logits])
            prompts[case] = ids
            found = list(llava.chat(tiled.messages(turns), max_tokens=tiled.N_TOKENS).token_ids)
            recorded.assert_equal_or_tie(found, answers[case], ties[case])
            total += len(answers[case])
            equal += sum(a == b for a, b in zip(found, answers[case], strict=False))
    print(f"\n{name}: {equal} of {total} tokens equal")
    assert total == 60
    judge(request, f"answers, {name}", answers)
    judge(request, f"prompts, {name}", {case: " ".join(map(str, ids)) for case, ids in prompts.items()})
    if request.config.getoption("--record"):
        tiled.keep(f"ties, {name}", ties)


def test_yis_slow_tokenizer_agrees(make_checkpoint: Any, make_bundle: Any) -> None:
    """The original code has each text between images tokenized by the sentencepiece library, without a space first."""
    import sentencepiece

    layout = {**tiled.LAYOUTS["ChatML"], "naming": "original", "aspect": "anyres"}
    model = sentencepiece.SentencePieceProcessor(str(make_checkpoint(**layout) / "tokenizer.model"))
    with Llava.load(make_bundle("F16", "F16", **layout).folder) as llava:
        for turns in CONVERSATIONS.values():
            chunks = [model.encode(chunk) for chunk in chatml(turns).split("<image>")]
            with llava.session() as session:
                items = session.count([Message(role, text, [IMAGE] * n) for role, text, n in turns])  # type: ignore[arg-type]
            expected = chunks[0] + [i for chunk in chunks[1:] for i in [-200, *chunk]]
            assert [i if isinstance(i, int) else -200 for i in items] == expected, turns

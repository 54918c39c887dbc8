"""The layouts beyond llava-1.5 against transformers in float32, computed here and now."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import mixed_text
import numpy as np
import pictures
import pytest
import recorded
import variants
from prompts import PROMPTS, for_transformers, messages
from test_reference import GREEDY, features_of, model_of, opened, processor_of

from pocketllava import Llava
from pocketllava.vision import image

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def judge(request: pytest.FixtureRequest, name: str, value: Any) -> None:
    """Hold the recording to what transformers gives now, or write it."""
    if request.config.getoption("--record"):
        packages = ("transformers", "torch", "tokenizers", "pillow", "numpy", "llama-cpp-python")
        variants.keep("versions", {p: importlib.metadata.version(p) for p in packages})
        variants.keep(name, value)
    assert variants.load()[name] == value, f"recording of {name} is stale: pytest -m reference --record"


def test_ids_of_300_lines(make_checkpoint: Any, request: pytest.FixtureRequest) -> None:
    tokenizer = processor_of(make_checkpoint(**variants.LAYOUTS["Llama 3"])).tokenizer
    ids = [tokenizer(line, add_special_tokens=False).input_ids for line in mixed_text.lines()]
    judge(request, "token ids", [" ".join(map(str, line)) for line in ids])


def answer_of(model: Any, processor: Any, data: bytes) -> tuple[list[int], list[Any]]:
    """(greedy token ids up to any end-of-sequence id, logits at each step)."""
    import torch

    turns = for_transformers([("user", recorded.QUESTION, 1)])
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    begins = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
    inputs = processor(images=opened(data), text=text, return_tensors="pt", add_special_tokens=not begins)
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=recorded.N_TOKENS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    last = next((n for n, i in enumerate(ids) if i in (ends if isinstance(ends, list) else [ends])), len(ids))
    return ids[:last], [np.asarray(step[0]) for step in out.logits]


@pytest.mark.parametrize("name", variants.LAYOUTS)
def test_features_prompts_and_answers(
    make_checkpoint: Any, make_bundle: Any, name: str, request: pytest.FixtureRequest
) -> None:
    layout = variants.LAYOUTS[name]
    folder, bundle = make_checkpoint(**layout), make_bundle("F16", "F16", **layout)
    model, processor = model_of(folder), processor_of(folder)
    expected = [answer_of(model, processor, data) for data in pictures.four()]
    judge(request, f"answers, {name}", [ids for ids, _ in expected])
    if request.config.getoption("--record"):
        variants.keep(f"ties, {name}", [recorded.ties_of(logits) for _, logits in expected])
    equal = 0
    with Llava.load(bundle.folder) as llava:
        for data, (ids, logits) in zip(pictures.four(), expected, strict=True):
            values = processor.image_processor(
                opened(data), do_rescale=False, do_normalize=False, return_tensors="np"
            )["pixel_values"][0]
            assert np.array_equal(image.preprocess(data, bundle.preprocessing), np.moveaxis(values, 0, -1))
            error = recorded.relative_error(llava.image_features(data), features_of(model, processor, data))
            found = list(llava.ask(data, recorded.QUESTION, options=GREEDY).token_ids)
            equal += sum(a == b for a, b in zip(found, ids, strict=False))
            print(f"\n{name}: relative error {error:.2e}, {equal} tokens equal")
            assert error <= 1.5e-3
            recorded.assert_equal_or_tie(found, ids, recorded.ties_of(logits))
        for turns in PROMPTS.values():
            text = processor.apply_chat_template(for_transformers(turns), add_generation_prompt=True)
            bos = layout.get("llama3", False)
            wanted = processor.tokenizer(text, add_special_tokens=not bos).input_ids
            place = llava.bundle.manifest.image_token_id
            with llava.session() as session:
                ids_found = session.count(messages(turns))
            assert [i if isinstance(i, int) else place for i in ids_found] == wanted

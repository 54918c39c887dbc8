"""The original authors' layout against transformers in float32: the same weights under the hub's names.

Pixels are padded by hand, ids put together by hand from each text between images, as the original code does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import recorded
import small_tokenizer
from test_original import CONVERSATIONS, LAYOUTS, as_messages, expand_by_hand, prompt_of
from test_reference import model_of, opened

from pocketllava import Llava, Options

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
GREEDY = Options(max_tokens=recorded.N_TOKENS)
HUB_ONLY = ("naming", "weights", "tower", "shards")


def hub(layout: dict[str, Any]) -> dict[str, Any]:
    """The layout of the same weights under the hub's names; its tokenizer puts a space first only."""
    return {k: v for k, v in layout.items() if k not in HUB_ONLY} | {"scheme": "first"}


def judge(name: str, value: Any, request: pytest.FixtureRequest) -> None:
    """Hold the recording to what transformers gives now, or write it."""
    if request.config.getoption("--record"):
        recorded.keep(name, value, recorded.ORIGINAL_FILE)
    assert recorded.load(recorded.ORIGINAL_FILE)[name] == value, f"recording of {name} is stale"


def ids_by_hand(prompt: str, tokenizer: Any, image_ids: list[int]) -> list[int]:
    """tokenizer_image_token: every text between images alone, BOS once, image_ids where a picture goes."""
    ids = [1]
    for n, chunk in enumerate(prompt.split("<image>")):
        found = tokenizer(chunk).input_ids
        assert found[0] == 1
        ids += (image_ids if n else []) + found[1:]
    return ids


def tokenizer_of(folder: Path) -> Any:
    """transformers' tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_token_ids(make_checkpoint: Any, make_bundle: Any, kind: str, request: pytest.FixtureRequest) -> None:
    layout = next(x for x in LAYOUTS.values() if x.get("kind", "llama") == kind)
    tokenizer = tokenizer_of(make_checkpoint(**hub(layout)))
    expected = {
        case: ids_by_hand(prompt_of(turns, kind), tokenizer, [-200]) for case, turns in CONVERSATIONS.items()
    }
    with Llava.load(make_bundle("F16", "F16", **layout).folder) as llava:
        for case, turns in CONVERSATIONS.items():
            with llava.session() as session:
                found = session.count(as_messages(turns))
            assert [i if isinstance(i, int) else -200 for i in found] == expected[case], case
    judge(f"token ids, {kind}", expected, request)


def test_the_slow_tokenizer_agrees(make_checkpoint: Any) -> None:
    """Texts without special tokens, through the sentencepiece library itself, as the slow tokenizer does."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(make_checkpoint(naming="original") / "tokenizer.model"))
    tokenizer = tokenizer_of(make_checkpoint(scheme="first"))
    for turns in CONVERSATIONS.values():
        for chunk in prompt_of(turns, "llama").replace("</s>", "<image>").split("<image>"):
            assert tokenizer(chunk).input_ids[1:] == model.encode(chunk), chunk


@pytest.mark.parametrize("name", LAYOUTS)
def test_features_and_answers(
    make_checkpoint: Any, make_bundle: Any, name: str, request: pytest.FixtureRequest
) -> None:
    import torch
    from transformers import CLIPImageProcessorPil

    layout = LAYOUTS[name]
    folder, kind = make_checkpoint(**hub(layout)), layout.get("kind", "llama")
    model, tokenizer = model_of(folder), tokenizer_of(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    prompt = prompt_of([("user", recorded.QUESTION, 1)], kind)
    ids = torch.tensor([ids_by_hand(prompt, tokenizer, [recorded.image_token()] * 576)])
    n_rows = len(small_tokenizer.vocabulary())  # the hub's layout has rows more, which the original has not
    more = list(range(n_rows, model.config.text_config.vocab_size))
    answers, ties, total = [], [], 0
    with Llava.load(make_bundle("F16", "F16", **layout).folder) as llava:
        for data in pictures.four():
            pixels = processor(expand_by_hand(opened(data)), return_tensors="pt").pixel_values
            with torch.no_grad():
                features = model.get_image_features(pixels)
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
                    max_new_tokens=recorded.N_TOKENS, output_logits=True, return_dict_in_generate=True,
                    suppress_tokens=more,
                )  # fmt: skip
            expected = np.asarray(getattr(features, "pooler_output", features)[0], dtype=np.float32)
            error = recorded.relative_error(llava.image_features(data), expected)
            assert error <= (1e-2 if layout.get("dtype") == "BF16" else 1e-3)
            wanted = out.sequences[0, ids.shape[1] :].tolist()
            wanted = wanted[: wanted.index(2)] if 2 in wanted else wanted
            found = list(llava.ask(data, recorded.QUESTION, options=GREEDY).token_ids)
            ties.append(recorded.ties_of([np.asarray(step[0]) for step in out.logits]))
            recorded.assert_equal_or_tie(found, wanted, ties[-1])
            total += sum(a == b for a, b in zip(found, wanted, strict=False))
            print(f"\n{name}: relative error {error:.2e}")
            answers.append(wanted)
    print(f"\n{name}: {total} of {sum(map(len, answers))} tokens equal")
    judge(f"answers, {name}", answers, request)
    if request.config.getoption("--record"):
        recorded.keep(f"ties, {name}", ties, recorded.ORIGINAL_FILE)

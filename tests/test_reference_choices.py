"""Probabilities of choices against transformers' log probabilities in float32, on the demo's trained weights."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import recorded

from pocketllava import Llava
from pocketllava.convert import convert
from pocketllava.models import demo
from pocketllava.models.demo import scenes

CHECKPOINT = Path(demo.__file__).parent / "checkpoint"
SEEDS = range(scenes.HELD_OUT_SEEDS.start + 60, scenes.HELD_OUT_SEEDS.start + 64)
# No choice begins another one: what such a one counts is the business of test_structured.py.
ASKED = (
    ("Is there a red heart?", ("yes", "no")),
    ("What color is the background?", ("white", "gray", "black")),
    ("How many objects are there?", ("1", "2", "3", "4", "5")),
    ("What is at the center?", ("a red square", "a blue star", "nothing", "a green circle")),
)
BOUND = 1e-3  # of a probability, for F32 weights; spellings of less than 1e-4 of another are left out


def name_of(seed: int, question: str) -> str:
    """Of a case in the recording."""
    return f"{seed - SEEDS.start}: {question}"


def png(seed: int) -> bytes:
    """A scene."""
    file = io.BytesIO()
    scenes.scene(seed).draw().save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo in F32."""
    bundle = convert(CHECKPOINT, tmp_path_factory.mktemp("demo") / "f32", quant="F32", mmproj="F32")
    with Llava.load(bundle.folder, n_threads=1) as llava:
        yield llava


def differences(llava: Llava, expected: dict[str, list[float]]) -> list[float]:
    """|ours - transformers'| of every probability."""
    return [
        abs(choice.probability - dict(zip(choices, expected[name_of(seed, question)], strict=True))[choice.text])
        for seed in SEEDS
        for question, choices in ASKED
        for choice in llava.ask(png(seed), question, choices=choices).choices
    ]  # fmt: skip


@pytest.mark.slow
def test_probabilities_are_the_recorded_ones(llava: Llava) -> None:
    expected = recorded.load().get("choices")
    if expected is None:
        pytest.skip("transformers' probabilities were not recorded: make record")
    assert max(differences(llava, expected)) <= BOUND


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_probabilities_are_those_of_transformers(llava: Llava, request: pytest.FixtureRequest) -> None:
    from test_reference import model_of, processor_of

    model, processor = model_of(CHECKPOINT), processor_of(CHECKPOINT)
    expected = {
        name_of(seed, question): probabilities(model, processor, png(seed), question, choices)
        for seed in SEEDS
        for question, choices in ASKED
    }
    if request.config.getoption("--record"):
        recorded.keep("choices", {name: [round(p, 6) for p in values] for name, values in expected.items()})
    off = differences(llava, expected)
    print(f"\n{len(off)} probabilities of choices: {max(off):.1e} off at most, F32")
    assert max(off) <= BOUND
    kept = recorded.load().get("choices", {})
    stale = "recording of choices is stale: pytest -m reference --record"
    assert kept.keys() == expected.keys(), stale
    for name, values in expected.items():
        assert kept[name] == pytest.approx(values, abs=1e-4), stale


def probabilities(
    model: Any, processor: Any, data: bytes, question: str, choices: tuple[str, ...]
) -> list[float]:
    """Each choice's share of what all spellings of all choices have, every one evaluated whole."""
    from prompts import for_transformers
    from test_reference import opened

    text = processor.apply_chat_template(
        for_transformers([("user", question, 1)]), add_generation_prompt=True
    )
    picture = opened(data)
    shares = [
        sum(math.exp(logprob(model, processor, picture, text, spelled)) for spelled in spellings(choice, choices))
        for choice in choices
    ]  # fmt: skip
    return [share / sum(shares) for share in shares]


def spellings(choice: str, choices: tuple[str, ...]) -> set[str]:
    """As an answer may begin: with a space or without, its first letter in either case."""
    firsts = {choice[0], choice[0].swapcase()}
    texts = {
        first + choice[1:] for first in firsts if first == choice[0] or first + choice[1:] not in choices
    }
    return {space + text for space, text in itertools.product((" ", ""), texts)}


def logprob(model: Any, processor: Any, picture: Any, prompt: str, answer: str) -> float:
    """log P(answer | picture, prompt), all of its tokens."""
    import torch

    asked = processor(images=picture, text=prompt, return_tensors="pt")["input_ids"][0].tolist()
    inputs = processor(images=picture, text=prompt + answer, return_tensors="pt")
    ids, n = inputs["input_ids"][0].tolist(), len(asked)
    assert ids[:n] == asked, "the answer's beginning merges with the prompt's end"
    with torch.no_grad():
        rows = torch.log_softmax(model(**inputs).logits[0].double(), dim=-1)
    assert rows.shape[0] == len(ids)  # the processor writes a token for each patch
    return float(sum(rows[k - 1, ids[k]] for k in range(n, len(ids))))

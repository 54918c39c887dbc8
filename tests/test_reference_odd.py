"""Odd checkpoints against transformers in float32, computed here and now: the same prompts, the same answers."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import odd_checkpoints
import pictures
import pytest
import recorded
from prompts import PROMPTS, for_transformers
from test_odd_checkpoints import prompt_ids
from test_reference import GREEDY, answer_of, model_of, processor_of

from pocketllava import Llava
from pocketllava.convert import convert

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def judge(request: pytest.FixtureRequest, name: str, value: Any) -> None:
    """Hold the recording to what transformers gives now, or write it."""
    if request.config.getoption("--record"):
        packages = ("transformers", "torch", "tokenizers", "sentencepiece", "protobuf")
        odd_checkpoints.keep("versions", {p: importlib.metadata.version(p) for p in packages})
        odd_checkpoints.keep(name, value)
    assert odd_checkpoints.load()[name] == value, (
        f"recording of {name} is stale: pytest -m reference --record"
    )


@pytest.mark.parametrize("name", odd_checkpoints.TENSORS)
def test_answers(tmp_path: Path, name: str) -> None:
    folder = odd_checkpoints.write(tmp_path / "checkpoint", name)
    ids, logits = answer_of(model_of(folder), processor_of(folder), pictures.four()[0])
    bundle = convert(folder, tmp_path / "bundle", quant="F16", mmproj="F16")
    with Llava.load(bundle.folder) as llava:
        answer = llava.ask(pictures.four()[0], recorded.QUESTION, options=GREEDY)
    recorded.assert_equal_or_tie(list(answer.token_ids), ids, recorded.ties_of(logits))


@pytest.mark.parametrize("name", odd_checkpoints.TOKENS)
def test_prompts(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    folder = odd_checkpoints.write(tmp_path / "checkpoint", name)
    processor = processor_of(folder)
    bos = processor.tokenizer.bos_token
    expected = {}
    for prompt in odd_checkpoints.PROMPTS:
        text = processor.apply_chat_template(for_transformers(PROMPTS[prompt]), add_generation_prompt=True)
        ids = processor.tokenizer(text, add_special_tokens=not text.startswith(bos)).input_ids
        expected[prompt] = " ".join(map(str, ids))
    judge(request, name, expected)
    assert prompt_ids(convert(folder, tmp_path / "bundle", quant="F16")) == expected

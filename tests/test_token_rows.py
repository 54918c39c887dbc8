"""Text beside an image goes with it in one batch, as rows that are what libllama would look up itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest

from pocketllava import Bundle, Llava, Message, Options
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.llamacpp.token_rows import TokenRows

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q3_K_S")
IDS = [1, 5, 300, 17, 2, 64, 9, 31]


@pytest.mark.parametrize("quant", TYPES)
def test_logits_of_rows_are_those_of_their_tokens(make_bundle: Any, quant: str) -> None:
    bundle = make_bundle(quant)
    text, _ = TextModel.load(bundle.model, n_ctx=256, n_threads=1, n_threads_batch=1)
    try:
        text.decode_tokens(IDS)
        expected = text.logits()
        text.truncate(0)
        text.record([])
        features = TokenRows(bundle.model).read(IDS[:3])
        assert features is not None
        text.decode_mixed([features, IDS[3:]], 0)
        assert np.array_equal(text.logits(), expected)
        assert text.token_ids == [0, 0, 0, *IDS[3:]]
    finally:
        text.close()


def test_rows_of_a_file_that_changed_are_not_used(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(bundle.model.read_bytes())
    rows = TokenRows(copy)
    assert rows.read(IDS) is not None
    with copy.open("ab") as file:
        file.write(b"\0")
    assert rows.read(IDS) is None
    copy.unlink()
    assert rows.read(IDS) is None


def test_the_same_prompt_again_evaluates_nothing_and_repeats_its_answer(llava: Llava) -> None:
    turns = [Message("user", "What is it?", pictures.four()[0])]
    options = Options(max_tokens=12, temperature=1.0, seed=7)
    llava.clear_cache()
    first = llava.chat(turns, options=options)
    again = llava.chat(turns, options=options)
    assert again.token_ids == first.token_ids
    assert again.usage.cached_tokens == first.usage.prompt_tokens
    other = llava.chat(turns, options=Options(max_tokens=12, temperature=1.0, seed=8))
    assert other.token_ids != first.token_ids
    llava.ask(pictures.four()[1], "What is it?", max_tokens=3)
    assert llava.chat(turns, options=options).token_ids[:1] == first.token_ids[:1]

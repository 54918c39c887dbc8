"""Evaluated images are kept in memory and on disk, and prepared before the question: with the same logits."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import psutil
import pytest
from test_cache import logits

from pocketllava import (
    Bundle,
    ContextOverflow,
    ImageError,
    InputError,
    Llava,
    Message,
    Options,
    StateError,
    Timings,
)
from pocketllava.models.blob_cache import SUFFIX, BlobCache
from pocketllava.models.plan import MAX_KEPT

SHORT = Options(max_tokens=3)
ONE = Options(max_tokens=1)
A, B, C = pictures.four()[:3]


def evaluated(model: Llava, picture: Any, question: str = "What is it?") -> tuple[Any, Timings]:
    """Logits after the prompt, and the timings."""
    timings = model.ask(picture, question, options=ONE).timings
    return logits(model), timings


def n_encoded(model: Llava) -> int:
    """Images that went through the vision tower."""
    with model.session() as session:
        return session.vision.correction.corrected


@pytest.fixture
def expected(llava: Llava, evaluated_alone: Any) -> Any:
    """Logits after a question about each of three pictures, from evaluation alone; the caches are empty."""
    llava.clear_cache()
    return evaluated_alone


@pytest.fixture(scope="module")
def evaluated_alone(llava: Llava) -> Any:
    """The same, computed once."""
    found = []
    for picture in (A, B, C):
        llava.clear_cache()
        found.append(evaluated(llava, picture)[0])
    return found


def test_going_back_to_a_picture_restores_it_bit_for_bit(llava: Llava, expected: Any) -> None:
    for picture, logits_, kept in ((A, 0, False), (B, 1, False), (A, 0, True), (B, 1, True), (A, 0, True)):
        found, timings = evaluated(llava, picture)
        assert np.array_equal(found, expected[logits_])
        assert (timings.cached_tokens > 576) == kept


def in_turns(model: Llava, rounds: int) -> list[Timings]:
    """Three people talk about a picture of their own, a turn each; the timings of every turn but the first."""
    talks = [[Message("user", "What is it?", picture)] for picture in (A, B, C)]
    found = []
    for n in range(rounds):
        for turns in talks:
            if n:
                turns.append(Message("user", f"And number {n}?"))
            answer = model.chat(turns, options=SHORT)
            turns.append(Message("assistant", "A thing."))
            if n:
                found.append(answer.timings)
    return found


def test_people_who_take_turns_find_their_conversations_kept(llava: Llava) -> None:
    llava.clear_cache()
    for timings in in_turns(llava, 4):
        assert timings.cached_tokens > 576
        # the last answer and the question, no earlier turn
        assert timings.prompt_tokens - timings.cached_tokens < 30


def test_a_conversation_that_was_kept_goes_on_as_a_fresh_model_does(llava: Llava) -> None:
    turns = [
        Message("user", "What is it?", A),
        Message("assistant", "A thing."),
        Message("user", "Is it red?"),
    ]
    llava.clear_cache()
    expected = llava.chat(turns, options=SHORT)
    llava.clear_cache()
    llava.chat(turns[:1], options=ONE)
    evaluated(llava, B)
    found = llava.chat(turns, options=SHORT)
    assert found.token_ids == expected.token_ids
    assert found.timings.cached_tokens > 576 + 5  # its text, too


def test_a_seed_repeats_its_answer_after_other_conversations(llava: Llava) -> None:
    drawn = Options(max_tokens=8, temperature=1.0, seed=7)
    first = llava.ask(A, "What is it?", options=drawn)
    llava.ask([B, C], "Which?", options=ONE)
    again = llava.ask(A, "What is it?", options=drawn)
    assert again.token_ids == first.token_ids
    assert again.timings.cached_tokens == again.timings.prompt_tokens


def test_the_bytes_of_what_is_kept_are_bounded(bundle: Bundle, expected: Any) -> None:
    with Llava.load(bundle.folder) as model:
        model.ask(A, "What is it?", options=ONE)
        with model.session() as session:
            one = session.text.state_bytes()
    for kept_bytes, n_kept in ((0, 0), (one - 1, 1), (one, 1), (2 * one, 2)):
        with Llava.load(bundle.folder, kept_bytes=kept_bytes) as model:
            for picture in (A, B, C):
                evaluated(model, picture)
            for picture, n, is_kept in ((B, 1, n_kept > 0), (A, 0, n_kept > 1)):
                found, timings = evaluated(model, picture)
                assert (timings.cached_tokens > 576) == is_kept
                assert is_kept or timings.cached_tokens < 20
                assert np.array_equal(found, expected[n])
            with model.session() as session:
                assert session.prefixes.n_bytes <= kept_bytes


def test_a_small_model_keeps_a_few_conversations(bundle: Bundle) -> None:
    with Llava.load("demo", kept_bytes=1 << 30) as model:
        for n in range(MAX_KEPT + 5):
            model.ask(np.full((64, 64, 3), 5 * n, np.uint8), "What is this?", options=ONE)
        with model.session() as session:
            assert len(session.prefixes) == MAX_KEPT


def test_a_kept_pair_of_pictures_serves_for_its_first(llava: Llava, expected: Any) -> None:
    llava.ask([A, B], "Which?", options=ONE)
    evaluated(llava, C)
    found, timings = evaluated(llava, A)
    assert timings.cached_tokens > 576
    # a GPU's backend takes other kernels for the longer batch that both pictures were evaluated in
    tolerance = 0 if llava.devices[0].startswith("CPU") else 1e-4
    assert np.allclose(found, expected[0], rtol=0, atol=tolerance)


def on_disk(bundle: Bundle, folder: Path, **how: Any) -> Llava:
    return Llava.load(bundle.folder, cache_dir=folder, **how)


def test_an_image_seen_before_is_not_encoded_again(bundle: Bundle, tmp_path: Path) -> None:
    with on_disk(bundle, tmp_path / "cache") as first:
        found, timings = evaluated(first, A)
        assert n_encoded(first) == 1
    assert [p.suffixes for p in (tmp_path / "cache").iterdir()] == [[".features", SUFFIX]]
    with on_disk(bundle, tmp_path / "cache") as second:
        again, timings = evaluated(second, A)
        assert n_encoded(second) == 0
        assert timings.cached_tokens == 0
        assert np.array_equal(again, found)


def test_a_prefix_on_disk_gives_the_same_bits(bundle: Bundle, tmp_path: Path) -> None:
    with on_disk(bundle, tmp_path, keep_prefixes=True) as first:
        found, timings = evaluated(first, A)
        assert timings.cached_tokens == 0
    with on_disk(bundle, tmp_path, keep_prefixes=True) as second:
        again, timings = evaluated(second, A)
        assert timings.cached_tokens > 576
        assert np.array_equal(again, found)
        assert evaluated(second, A, "Anything else?")[1].cached_tokens > 576


@pytest.mark.parametrize("damage", ["changed", "cut", "empty"])
def test_a_damaged_cache_is_made_again(
    bundle: Bundle, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with on_disk(bundle, tmp_path, keep_prefixes=True) as first:
        found, _ = evaluated(first, A)
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 64
        path.write_bytes({"changed": data, "cut": data[:-1000], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING), on_disk(bundle, tmp_path, keep_prefixes=True) as second:
        again, timings = evaluated(second, A)
        assert (timings.cached_tokens, np.array_equal(again, found)) == (0, True)
        assert caplog.text.count("damaged; it is made again") == 2
    with on_disk(bundle, tmp_path, keep_prefixes=True) as third:
        assert evaluated(third, A)[1].cached_tokens > 576


def test_a_prefix_is_bound_to_its_settings_and_model(
    bundle: Bundle, make_bundle: Any, tmp_path: Path
) -> None:
    with on_disk(bundle, tmp_path, keep_prefixes=True) as first:
        evaluated(first, A)
    with on_disk(bundle, tmp_path, keep_prefixes=True, kv_type="q8_0") as other_type:
        assert evaluated(other_type, A)[1].cached_tokens == 0
    with on_disk(make_bundle("Q8_0"), tmp_path, keep_prefixes=True) as other_model:
        assert evaluated(other_model, A)[1].cached_tokens == 0
    with on_disk(bundle, tmp_path, keep_prefixes=True, n_ctx=1024) as smaller:
        assert evaluated(smaller, A)[1].cached_tokens > 576


def test_a_state_that_llama_cpp_refuses_is_evaluated(
    bundle: Bundle, tmp_path: Path, llava: Llava, expected: Any
) -> None:
    """A file with a right hash and wrong content: made by hand, or by a library that calls itself the same."""
    with on_disk(bundle, tmp_path, keep_prefixes=True) as model:
        evaluated(model, A)
        store = BlobCache(tmp_path, 1 << 30)
        for name in [p.name.removesuffix(SUFFIX) for p in tmp_path.glob(f"*.prefix{SUFFIX}")]:
            state = store.get(name)
            assert state is not None
            store.put(name, bytes(state[: len(state) // 2]))
        model.clear_cache()
        found, timings = evaluated(model, A)
        assert timings.cached_tokens == 0
        assert np.abs(found - expected[0]).max() < 1e-2 * np.abs(expected[0]).max()  # features are F16 here


def test_a_useless_folder_warns_and_answers(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with on_disk(bundle, tmp_path / "file", keep_prefixes=True) as model:
        assert model.ask(A, "What is it?", options=SHORT).token_ids
    assert "cannot be used as a cache folder" in caplog.text


def test_a_prepared_image_waits_only_for_its_question(llava: Llava, expected: Any) -> None:
    preparation = llava.prepare(A)
    assert preparation.wait()
    assert preparation.done
    found, timings = evaluated(llava, A)
    assert timings.encode_s < 1e-3
    assert timings.cached_tokens > 576
    assert np.array_equal(found, expected[0])
    assert llava.prepare(A).wait()  # nothing left to do, and the question is not forgotten
    long = "What is it? " + "Look closely. " * 20
    expected_cached = llava.ask(A, long, options=ONE).timings.prompt_tokens
    assert llava.prepare(A).wait()
    again = llava.ask(A, long + " Well?", options=ONE).timings
    assert again.cached_tokens > 576 + 40
    assert again.cached_tokens < expected_cached
    found, timings = evaluated(llava, A)  # evaluated from the middle of its text: equal within rounding
    assert timings.cached_tokens > 576 + 4
    assert np.linalg.norm(found - expected[0]) <= 5e-3 * np.linalg.norm(expected[0])


def test_an_image_is_prepared_in_the_middle_of_a_conversation(llava: Llava) -> None:
    before = [Message("user", "What is it?", (A,)), Message("assistant", "A thing.")]
    turns = [*before, Message("user", "And this?", (B,))]
    llava.clear_cache()
    expected = llava.chat(turns, options=SHORT).token_ids
    llava.clear_cache()
    assert llava.prepare(B, after=before).wait()
    answer = llava.chat(turns, options=SHORT)
    assert answer.token_ids == expected
    assert answer.timings.cached_tokens > 2 * 576


def test_a_question_about_another_image_ends_a_preparation(llava: Llava, expected: Any) -> None:
    for wait_s in (0.0, 0.001, 0.01, 0.1):
        llava.clear_cache()
        preparation = llava.prepare(A)
        time.sleep(wait_s)
        assert np.array_equal(evaluated(llava, B)[0], expected[1])
        assert preparation.wait()
        assert np.array_equal(evaluated(llava, A)[0], expected[0])


def test_a_question_about_the_same_image_waits_for_it(llava: Llava) -> None:
    unseen = np.random.default_rng().integers(0, 255, (64, 64, 3), dtype=np.uint8)
    before = n_encoded(llava)
    preparation = llava.prepare(unseen.copy())
    found, _ = evaluated(llava, unseen)  # another object, the same picture
    assert preparation.done
    assert n_encoded(llava) == before + 1
    llava.clear_cache()
    assert np.array_equal(evaluated(llava, unseen)[0], found)


def test_what_is_wrong_with_a_prepared_image_is_told(llava: Llava) -> None:
    with pytest.raises(ImageError):
        llava.prepare(b"nonsense").wait()
    with pytest.raises(ContextOverflow):
        llava.prepare([A, B, C, A]).wait()
    with pytest.raises(InputError):
        llava.prepare(A, after=["Hello"])  # type: ignore[list-item]
    assert llava.ask(A, "What is it?", options=SHORT).token_ids


def test_closing_does_not_wait_for_a_preparation(bundle: Bundle) -> None:
    model = Llava.load(bundle.folder)
    preparation = model.prepare(A)
    model.close()
    assert preparation.done
    with pytest.raises(StateError, match=r"used after close\(\)"):
        model.prepare(A).wait()


def test_stopping_at_any_moment_leaves_the_next_answer_right(llava: Llava, expected: Any) -> None:
    """The function is asked at every node of a prompt's evaluation: thousands of times."""
    for moment in (0, 1, 10, 40, 80, 160):
        left = iter(range(moment))
        turns = [Message("user", "What is it?", (A,))]
        llava.clear_cache()
        chunks = list(
            llava.stream(turns, options=ONE, should_stop=lambda left=left: next(left, None) is None)
        )  # type: ignore[misc]
        assert chunks[-1].finish_reason in ("cancelled", "length")
        assert moment > 1 or chunks[-1].finish_reason == "cancelled"
        assert np.array_equal(evaluated(llava, A)[0], expected[0])


def test_300_pictures_leave_memory_as_it_was(bundle: Bundle) -> None:
    """Features and prefixes are bounded: after the first 30 nothing grows by more than 20 MB."""
    rng = np.random.default_rng(0)
    with Llava.load("demo") as model:
        for n in range(300):
            picture = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            model.ask(picture, "What is this?", options=ONE)
            if n == 30:
                before = psutil.Process().memory_info().rss
        assert psutil.Process().memory_info().rss - before < 20 << 20
    assert threading.active_count() < 10

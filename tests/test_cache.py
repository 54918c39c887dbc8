"""The KV cache keeps what two prompts share, knows pictures by content, and answers as a fresh model does."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketllava import Bundle, ContextOverflow, ImageError, Llava, Message, Options
from pocketllava.integrations.llama_cpp import LlavaChatHandler
from pocketllava.models.blob_cache import BlobCache
from pocketllava.prompt.items import ImageSpan, PromptItem, image_ends, n_positions, position_ids, shared
from pocketllava.vision.feature_cache import FeatureCache
from pocketllava.vision.image_processor import key_of

SHORT = Options(max_tokens=3)
CONVERSATIONS = int(os.environ.get("CONVERSATIONS", "8"))  # 200 were run by hand
TEXTS = (
    "What is it?",
    "What is it",
    "What is this?",
    "",
    "Describe the image.",
    "the",
    "there are",
    "🙂 dog",
)


def test_what_two_prompts_share() -> None:
    a, b = ImageSpan("a", 576), ImageSpan("b", 576)
    assert shared([1, 2, a, 3, 4], [1, 2, a, 3, 5, 6]) == 4
    assert shared([1, 2, a, 3], [1, 2, b, 3, 4]) == 2
    assert shared([1, 2, 3], [1, 2, 3]) == 3
    assert shared([], [1]) == 0
    assert n_positions([1, a, 2]) == 578
    assert position_ids([1, ImageSpan("a", 3), 2], 9) == [1, 9, 9, 9, 2]
    assert image_ends([1, a, 2, b]) == [4, 2]


def test_the_next_turn_evaluates_only_what_is_new(llava: Llava) -> None:
    picture = pictures.four()[0]
    turns = [Message("user", "What is it?", picture)]
    first = llava.chat(turns, options=Options(max_tokens=24))
    again = llava.chat([*turns, Message("assistant", "A thing."), Message("user", "Is it?")], options=SHORT)
    assert again.usage.cached_tokens == first.usage.prompt_tokens
    longer = [*turns, Message("assistant", "A thing."), Message("user", "Is it red?")]
    new = llava.chat(longer, options=SHORT).usage
    assert new.prompt_tokens - new.cached_tokens <= again.usage.prompt_tokens - first.usage.prompt_tokens


@given(
    held=st.lists(st.integers(0, 2) | st.builds(ImageSpan, st.sampled_from("ab"), st.just(4)), max_size=8),
    wanted=st.lists(
        st.integers(0, 2) | st.builds(ImageSpan, st.sampled_from("ab"), st.just(4)), min_size=1, max_size=8
    ),
)
def test_the_shared_prefix_is_the_longest(held: list[PromptItem], wanted: list[PromptItem]) -> None:
    n = shared(held, wanted)
    assert held[:n] == wanted[:n]
    assert n == len(wanted) or n == len(held) or held[n] != wanted[n]


def test_features_are_kept_within_their_bytes() -> None:
    cache, shape = FeatureCache(max_bytes=40), (2, 2)
    for name in "abc":
        cache.put(name, np.zeros(shape, np.float32))
        cache.get("a", shape)
    assert cache.get("b", shape) is None
    assert cache.get("a", shape) is not None
    assert cache.get("c", shape) is not None
    assert cache.n_bytes == 32
    cache.put("a", np.zeros((1, 2), np.float32))
    assert cache.n_bytes == 24
    cache.put("huge", np.zeros((10, 10), np.float32))
    assert cache.n_bytes == 0


def test_features_come_back_from_disk_as_they_were_given_out(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(0, 30, (5, 7)).astype(np.float32)
    first = FeatureCache(store=BlobCache(tmp_path, 1 << 20)).put("a", features)
    assert np.abs(first - features).max() <= 2**-11 * np.abs(features).max()
    again = FeatureCache(store=BlobCache(tmp_path, 1 << 20)).get("a", (5, 7))
    assert again is not None
    assert np.array_equal(again, first)
    assert FeatureCache(store=BlobCache(tmp_path, 1 << 20)).get("a", (7, 7)) is None
    beyond = np.full((5, 7), 1e6, np.float32)  # F16 has no such number
    cache = FeatureCache(store=BlobCache(tmp_path, 1 << 20))
    assert np.array_equal(cache.put("b", beyond), beyond)
    assert not BlobCache(tmp_path, 1 << 20).has("b.features")


@pytest.fixture(scope="module")
def fresh(bundle: Bundle) -> Iterator[Llava]:
    """A second model that forgets before every answer."""
    with Llava.load(bundle.folder) as model:
        yield model


def logits(model: Llava) -> Any:
    """Next-token logits after the last evaluated token."""
    with model.session() as session:
        return session.text.logits()


def same_as_fresh(llava: Llava, fresh: Llava, messages: list[Message]) -> int:
    """Compare tokens and logits; returns how many prompt tokens were kept."""
    fresh.clear_cache()
    found, expected = llava.chat(messages, options=SHORT), fresh.chat(messages, options=SHORT)
    assert expected.timings.cached_tokens == 0
    assert found.token_ids == expected.token_ids
    assert np.abs(logits(llava) - logits(fresh)).max() < 1e-3 * max(1.0, float(np.abs(logits(fresh)).max()))
    return found.timings.cached_tokens


def test_a_second_question_keeps_the_image(llava: Llava, fresh: Llava) -> None:
    picture = pictures.four()[0]
    llava.clear_cache()
    same_as_fresh(llava, fresh, [Message("user", "What is it?", (picture,))])
    kept = same_as_fresh(llava, fresh, [Message("user", "Is it red?", (picture,))])
    assert kept > 576
    other = same_as_fresh(llava, fresh, [Message("user", "Is it red?", (pictures.four()[1],))])
    assert other < 20


def test_a_repeated_question_sees_the_same_bits(llava: Llava) -> None:
    """So that a seed repeats its answer, whatever other picture was asked about in between."""
    one = Options(max_tokens=1)
    question = [Message("user", "What is it?", (pictures.four()[0],))]
    later = [*question, Message("assistant", "word " * 40), Message("user", "Sure?")]
    llava.clear_cache()
    llava.chat(question, options=one)
    first = logits(llava)
    for turns in (question, later, later):
        llava.chat(turns, options=one)
        found = logits(llava)
        assert llava.chat(turns, options=one).timings.cached_tokens > 576
        assert np.array_equal(logits(llava), found)
    llava.clear_cache()
    llava.chat(question, options=one)
    assert np.array_equal(logits(llava), first)
    llava.ask(pictures.four()[1], "Something in between?", options=one)
    llava.chat(question, options=one)
    assert np.array_equal(logits(llava), first)


def test_two_pictures_in_turn_forty_times(llava: Llava) -> None:
    """https://github.com/JamePeng/llama-cpp-python/issues/90: the wrong picture from the third call on."""
    pair = pictures.four()[:2]
    expected = []
    for picture in pair:
        llava.clear_cache()
        expected.append(llava.ask(picture, "What is it?", options=SHORT).token_ids)
    assert expected[0] != expected[1]
    with llava.session() as session:
        correction = session.vision.correction
    before = correction.corrected
    for _ in range(40):
        for picture, answer in zip(pair, expected, strict=True):
            assert llava.ask(picture, "What is it?", options=SHORT).token_ids == answer
    assert correction.corrected == before  # encoded once


def test_after_other_use_of_the_same_llama(bundle: Bundle, fresh: Llava) -> None:
    """A program's own Llama, with the handler and without it."""
    from llama_cpp import Llama, llama_cpp

    size = {"n_ctx": 1024, "n_batch": 576, "n_ubatch": 576}
    # Its layers are where the fresh model's are: a device rounds otherwise than the CPU.
    llama = Llama(str(bundle.model), **size, n_threads=2, n_gpu_layers=-1, verbose=False)
    session = LlavaChatHandler(bundle.folder).session(llama)

    def cached_tokens(picture: bytes) -> int:
        """What is evaluated for a question about a picture has a fresh model's logits; returns what is not."""
        question = [Message("user", "What is it?", (picture,))]
        prefilled = session.prefill(question)
        fresh.clear_cache()
        with fresh.session() as other:
            other.prefill(question)
            assert np.abs(session.text.logits() - other.text.logits()).max() < 1e-3
        return prefilled.cached_tokens

    def forget() -> None:
        llama.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)

    first, second = pictures.four()[:2]
    assert cached_tokens(first) == 0
    ids = llama.input_ids[: llama.n_tokens].tolist()
    llama.create_completion("Something else", max_tokens=2)
    assert cached_tokens(first) < 20
    forget()
    assert cached_tokens(first) == 0
    forget()
    llama.eval(ids)  # the same ids, with an image token's embedding where the picture was
    assert cached_tokens(first) == 0
    state = llama.save_state()
    assert cached_tokens(second) < 20
    llama.load_state(state)  # the first picture's cache under the second one's ids
    assert cached_tokens(second) == 0
    assert cached_tokens(first) > 576  # kept when the other picture came
    llama.close()


def test_one_handler_for_two_models(make_bundle: Any) -> None:
    from llama_cpp import Llama

    one, other = make_bundle("F16"), make_bundle("Q8_0")
    handler = LlavaChatHandler(one.folder)
    turns = [Message("user", "What is it?", (pictures.four()[0],))]
    for bundle in (one, other, one):
        llama = Llama(str(bundle.model), n_ctx=1024, n_threads=2, verbose=False)
        assert handler.session(llama).prefill(turns).cached_tokens == 0
        assert handler.session(llama).prefill(turns).cached_tokens > 576
        llama.close()
    handler.close()


Step = tuple[str, Any]


@st.composite
def steps(draw: Any) -> list[Step]:
    """Things that people do in a conversation, one after another."""
    text, picture = st.sampled_from(TEXTS), st.integers(0, 2)
    step = st.one_of(
        st.tuples(st.just("say"), text),
        st.tuples(st.just("show"), st.tuples(text, st.lists(picture, min_size=1, max_size=2))),
        st.tuples(st.just("edit"), text),
        st.tuples(st.just("again"), st.none()),
        st.tuples(st.just("drop"), st.none()),
        st.tuples(st.just("stop"), st.integers(1, 2)),
        st.tuples(st.just("fail"), st.sampled_from(["image", "length"])),
        st.tuples(st.just("new"), st.none()),
        st.tuples(st.just("prepare"), st.tuples(picture, st.booleans())),
        st.tuples(st.just("break"), st.integers(0, 40)),
    )
    return list(draw(st.lists(step, min_size=2, max_size=6)))


@settings(
    max_examples=CONVERSATIONS,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=steps())
def test_any_conversation_answers_as_a_fresh_model_does(
    llava: Llava, fresh: Llava, script: list[Step]
) -> None:
    shown = pictures.four()
    turns: list[Message] = []
    for action, value in script:
        if action == "new":
            turns = []
        elif action == "drop":
            turns = turns[:-2]
        elif action == "edit" and turns:
            turns = [Message("user", value, turns[0].images), *turns[1:]]
        elif action == "fail":
            wrong = (b"nonsense",) if value == "image" else ()
            with pytest.raises((ImageError, ContextOverflow)):
                llava.chat([*turns, Message("user", "word " * 3000, wrong)])
            continue
        elif action in ("say", "stop", "break"):
            turns = [*turns, Message("user", value if action == "say" else "Stop")]
        elif action == "prepare":
            preparing = llava.prepare(shown[value[0]])
            preparing.wait(None if value[1] else 0.01)
            turns = [Message("user", "Prepared?", (shown[value[0]],))] if value[1] else turns
        elif action == "show":
            turns = [*turns, Message("user", value[0], tuple(shown[n] for n in value[1]))]
        if not turns or turns[-1].role != "user" or sum(len(m.images) for m in turns) > 2:
            turns = [Message("user", "What is it?", (shown[0],))]
        if action == "break":
            left = itertools.count(value, -1)
            list(llava.stream(turns, options=SHORT, should_stop=lambda left=left: next(left) <= 0))
        if action == "stop":
            stream = llava.stream(turns, options=SHORT)
            for _ in range(value):
                next(stream)
            stream.close()  # type: ignore[attr-defined]
        same_as_fresh(llava, fresh, turns)
        turns = [*turns, Message("assistant", llava.chat(turns, options=SHORT).text)]


def test_keys_are_of_content() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert key_of(pixels) == key_of(pixels.copy())
    pixels[0, 0, 0] = 1
    assert key_of(pixels) != key_of(np.zeros((4, 4, 3), np.uint8))

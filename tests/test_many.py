"""One question about many pictures: answers in their order, several decoded at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pictures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketllava import (
    Answer,
    Bundle,
    ContextOverflow,
    ImageError,
    InputError,
    Llava,
    Message,
    Options,
    StateError,
)
from pocketllava.engine.many import AHEAD, answers_at_once, in_order, read_ahead
from pocketllava.models.demo import scenes

QUESTION = "What's the content of the image?"
SCENES = [scenes.scene(scenes.HELD_OUT_SEEDS.start + n).draw() for n in range(12)]


@pytest.fixture(scope="module")
def demo() -> Iterator[Llava]:
    with Llava.load("demo") as llava:
        yield llava


@pytest.fixture(scope="module")
def asked(demo: Llava) -> list[Answer]:
    """The answers of ask(), one after another."""
    return [demo.ask(scene, QUESTION) for scene in SCENES]


def test_one_at_a_time_is_ask_bit_for_bit(demo: Llava, asked: list[Answer]) -> None:
    results = list(demo.ask_many(SCENES, QUESTION, batch=1, top_logprobs=1))
    alone = [demo.ask(scene, QUESTION, top_logprobs=1) for scene in SCENES]
    assert [r.logprobs for r in results if isinstance(r, Answer)] == [a.logprobs for a in alone]
    assert list(map(str, results)) == list(map(str, asked))


@pytest.mark.parametrize("batch", [2, 5, "auto"])
def test_several_at_once_answer_as_each_alone(demo: Llava, asked: list[Answer], batch: int) -> None:
    """More scenes: benchmarks/throughput.py."""
    results = list(demo.ask_many(iter(SCENES), QUESTION, batch=batch))
    assert [r.token_ids for r in results if isinstance(r, Answer)] == [a.token_ids for a in asked]
    assert [r.finish_reason for r in results if isinstance(r, Answer)] == [a.finish_reason for a in asked]
    for result, alone in zip(results, asked, strict=True):
        assert isinstance(result, Answer)
        assert result.usage.prompt_tokens == alone.usage.prompt_tokens
        assert result.timings.image_tokens == 36
        assert result.timings.devices == alone.timings.devices


def test_an_answers_beginning_is_gone_on_with(demo: Llava) -> None:
    options = Options(prefill="The image shows a blue", max_tokens=6)
    alone = [demo.ask(scene, QUESTION, options=options).text for scene in SCENES[:4]]
    assert list(map(str, demo.ask_many(SCENES[:4], QUESTION, batch=4, options=options))) == alone


@pytest.mark.parametrize("batch", [1, 3])
def test_a_bad_picture_gives_its_error_in_its_place(
    demo: Llava, asked: list[Answer], batch: int, tmp_path: Path
) -> None:
    wrong = [b"no picture", tmp_path / "gone.png", [SCENES[0], SCENES[1]], 7]
    mixed = [SCENES[0], wrong[0], wrong[1], SCENES[1], wrong[2], wrong[3], SCENES[2]]
    results = list(demo.ask_many(mixed, QUESTION, batch=batch))  # type: ignore[arg-type]
    assert [isinstance(r, ImageError) for r in results] == [False, True, True, False, True, True, False]
    assert [str(r) for r in results if isinstance(r, Answer)] == [str(a) for a in asked[:3]]
    assert "gone.png: cannot be read" in str(results[2])
    everything_wrong = list(demo.ask_many([b"", b"x"] * 4, QUESTION, batch=batch))
    assert all(isinstance(r, ImageError) for r in everything_wrong)
    assert not list(demo.ask_many([], QUESTION, batch=batch))


@settings(max_examples=8)
@given(st.integers(1, 6), st.lists(st.integers(0, 11), max_size=9), st.integers(1, 12), st.booleans())
def test_any_mix(
    demo: Llava, asked: list[Answer], batch: int, chosen: list[int], max_tokens: int, fewer: bool
) -> None:
    options = Options(max_tokens=max_tokens, image_tokens=30 if fewer else None, stop=("square",))
    results = list(demo.ask_many([SCENES[n] for n in chosen], QUESTION, batch=batch, options=options))
    expected = [demo.ask(SCENES[n], QUESTION, options=options) for n in chosen]
    assert [(str(r), getattr(r, "finish_reason", r)) for r in results] == [
        (a.text, a.finish_reason) for a in expected
    ]


def test_a_seed_is_each_answers_own(demo: Llava) -> None:
    options = Options(temperature=1.5, seed=5, max_tokens=12)
    alone = [demo.ask(scene, QUESTION, options=options).token_ids for scene in SCENES[:4]]
    for result, expected in zip(
        demo.ask_many(SCENES[:4], QUESTION, batch=4, options=options), alone, strict=True
    ):
        assert isinstance(result, Answer)
        assert result.token_ids == expected


def test_closing_it_frees_the_model(demo: Llava, asked: list[Answer]) -> None:
    for batch in (1, 4):
        endless = demo.ask_many((scene for _ in range(1000) for scene in SCENES), QUESTION, batch=batch)
        assert str(next(endless)) == asked[0].text
        endless.close()  # type: ignore[attr-defined]
        assert demo.ask(SCENES[1], QUESTION).text == asked[1].text


def test_other_calls_may_go_in_between(demo: Llava, asked: list[Answer]) -> None:
    results = demo.ask_many(SCENES, QUESTION, batch=3)
    found = []
    for n, result in enumerate(results):
        found.append(str(result))
        assert demo.ask(SCENES[-1 - n], QUESTION).text == asked[-1 - n].text
    assert found == [a.text for a in asked]


def test_a_model_that_is_closed_ends_it() -> None:
    for ends in (True, False):
        with Llava.load("demo") as llava:
            results = llava.ask_many(SCENES, QUESTION, batch=3)
            next(results)
        if ends:
            with pytest.raises(StateError, match="used after close"):
                next(results)
        else:
            results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch", [1, 4])
def test_what_the_iterator_raises_comes_after_the_answers(
    demo: Llava, asked: list[Answer], batch: int
) -> None:
    def broken() -> Iterator[object]:
        yield from SCENES[:6]
        raise OSError("the folder vanished")

    results = demo.ask_many(broken(), QUESTION, batch=batch)  # type: ignore[arg-type]
    assert [str(next(results)) for _ in range(6)] == [a.text for a in asked[:6]]
    with pytest.raises(OSError, match="the folder vanished"):
        next(results)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_iterator_of_the_images_may_use_the_model(demo: Llava, asked: list[Answer], batch: int) -> None:
    def using() -> Iterator[object]:
        for scene in SCENES:
            demo.count_tokens([Message("user", "a")])
            yield scene

    results = demo.ask_many(using(), QUESTION, batch=batch)  # type: ignore[arg-type]
    assert list(map(str, results)) == [a.text for a in asked]


def test_wrong_arguments_are_told_at_once(demo: Llava) -> None:
    for changes in ({"batch": 0}, {"batch": "many"}, {"batch": 2.5}, {"max_tokens": 0}):
        with pytest.raises(InputError):
            demo.ask_many(SCENES, QUESTION, **changes)  # type: ignore[arg-type]
    with pytest.raises(InputError):
        demo.ask_many(SCENES, None)  # type: ignore[arg-type]
    results = list(demo.ask_many(SCENES[:2], "word " * 3000, batch=2))
    assert all(isinstance(result, ContextOverflow) for result in results)


def test_an_isolated_model_and_choices_go_one_by_one(asked: list[Answer]) -> None:
    with Llava.load("demo", isolated=True) as llava:
        results = list(llava.ask_many([*SCENES[:2], b"x"], QUESTION, batch=4))
        assert [str(r) for r in results[:2]] == [a.text for a in asked[:2]]
        assert isinstance(results[2], ImageError)
        chosen = next(llava.ask_many(SCENES, "Is there a circle?", choices=["yes", "no"]))
        assert isinstance(chosen, Answer)
        assert chosen.choices


def test_random_weights_and_a_prompt_of_576_image_tokens(bundle: Bundle) -> None:
    shown = pictures.four()
    with Llava.load(bundle.folder, n_ctx=1024) as llava:
        alone = [llava.ask(image, "What is it?", max_tokens=8) for image in shown]
        together = list(llava.ask_many(shown, "What is it?", batch=4, max_tokens=8))
    agreeing = [
        a == b
        for one, other in zip(alone, together, strict=True)
        for a, b in zip(one.token_ids, getattr(other, "token_ids", ()), strict=True)
    ]
    assert sum(agreeing) >= 0.9 * len(agreeing)  # random weights have near ties


def test_no_more_is_read_ahead_than_is_said() -> None:
    taken: list[int] = []
    ahead = read_ahead((taken.append(n) or n for n in range(100)), lambda _: None)
    assert next(ahead) == 0
    assert len(taken) == AHEAD + 1
    ahead.close()
    assert list(in_order([(1, "b"), (0, "a"), (2, "c")])) == ["a", "b", "c"]


def test_how_many_at_once(bundle: Bundle) -> None:
    assert answers_at_once(bundle, 768, on_gpu=False) == 8
    assert answers_at_once(bundle, 768, on_gpu=True) == 16

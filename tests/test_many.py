"""One question about many pictures: answers in their order, several decoded at once."""

from __future__ import annotations

import itertools
import threading
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
from pocketllava.engine import many
from pocketllava.engine.many import AHEAD, answers_at_once, in_order, read_ahead
from pocketllava.llamacpp import sequences
from pocketllava.llamacpp.sequences import Sequences
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.models.demo import scenes
from pocketllava.models.memory import memory

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


@pytest.mark.parametrize("batch", [1, 4])
def test_a_stop_ends_the_answers_that_are_running(demo: Llava, asked: list[Answer], batch: int) -> None:
    cancel = threading.Event()
    results = demo.ask_many(
        (scene for _ in range(1000) for scene in SCENES), QUESTION, batch=batch, should_stop=cancel.is_set
    )
    whole = [next(results) for _ in range(3)]
    assert list(map(str, whole)) == [a.text for a in asked[:3]]
    cancel.set()
    rest = [r for r in results if isinstance(r, Answer)]
    assert len(rest) <= batch + 1
    assert {r.finish_reason for r in rest} <= {"stop", "cancelled"}
    for result, alone in zip(rest, asked[3:], strict=False):
        assert alone.text.startswith(result.text)
    assert not list(demo.ask_many(SCENES, QUESTION, batch=batch, should_stop=lambda: True))
    assert demo.ask(SCENES[1], QUESTION).text == asked[1].text


@pytest.mark.parametrize("after", range(0, 60, 7))
def test_a_stop_at_any_moment_gives_beginnings(demo: Llava, asked: list[Answer], after: int) -> None:
    """While a picture is encoded, evaluated, or answers are decoded."""
    looks = itertools.count()
    results = demo.ask_many(SCENES, QUESTION, batch=3, should_stop=lambda: next(looks) >= after)
    for result, alone in zip(results, asked, strict=False):
        assert isinstance(result, Answer)
        assert alone.text.startswith(result.text)
        assert result.finish_reason == "cancelled" or result.token_ids == alone.token_ids


@pytest.mark.parametrize("batch", [1, 4])
def test_it_waits_no_longer_for_others_than_is_said(demo: Llava, asked: list[Answer], batch: int) -> None:
    taken, free = threading.Event(), threading.Event()

    def busy() -> None:
        with demo.session():
            taken.set()
            free.wait(60)

    thread = threading.Thread(target=busy)
    thread.start()
    taken.wait(60)
    try:
        with pytest.raises(StateError, match="still busy with another call"):
            next(demo.ask_many(SCENES, QUESTION, batch=batch, queue_timeout_s=0.1))
        stops = demo.ask_many(SCENES, QUESTION, batch=batch, should_stop=taken.is_set)
        assert not list(stops)
    finally:
        free.set()
        thread.join()
    assert str(next(demo.ask_many(SCENES, QUESTION, batch=batch, queue_timeout_s=60))) == asked[0].text


@pytest.mark.parametrize("batch", [2, 5, "auto"])
def test_equal_pictures_are_answered_once(demo: Llava, asked: list[Answer], batch: int) -> None:
    chosen = [0, 0, 1, 0, 2, 2, 2, 1, 0, 3, 3, 3, 3, 3, 3, 4]
    results = list(demo.ask_many([SCENES[n].copy() for n in chosen], QUESTION, batch=batch))
    assert list(map(str, results)) == [asked[n].text for n in chosen]
    assert len({r.timings for r in results if isinstance(r, Answer)}) == 5
    drawn = {"temperature": 3.0, "max_tokens": 30}
    several = list(demo.ask_many([SCENES[0]] * 6, QUESTION, batch=batch, **drawn))  # type: ignore[arg-type]
    assert len(set(map(str, several))) > 1
    seeded = list(demo.ask_many([SCENES[0]] * 6, QUESTION, batch=batch, seed=3, **drawn))  # type: ignore[arg-type]
    assert len({r.timings for r in seeded if isinstance(r, Answer)}) == 1


def test_one_picture_without_end_is_no_loop(demo: Llava, asked: list[Answer]) -> None:
    results = demo.ask_many(itertools.repeat(SCENES[0]), QUESTION, batch=3)
    assert {str(next(results)) for _ in range(50)} == {asked[0].text}


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
    for changes in ({"batch": 0}, {"batch": "many"}, {"batch": 2.5}, {"max_tokens": 0}, {"should_stop": 1},
                    {"queue_timeout_s": -1}):  # fmt: skip
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


@pytest.mark.parametrize(("room_for", "at_once"), [(100, 16), (15, 12), (8, 8), (7, 4), (3, 3), (0, 1)])
def test_how_many_at_once(
    bundle: Bundle, room_for: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are not left over from fours, which ggml's kernels for CPUs take together."""
    each = memory(bundle, 768, "f16").kv_cache
    monkeypatch.setattr(many, "available_bytes", lambda: 2 * each * room_for)
    assert answers_at_once(bundle, 768) == at_once


def test_no_more_sequences_than_pictures(demo: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their KV caches are cleared, which touches all of their memory."""
    made: list[tuple[int, int]] = []

    class Noted(Sequences):
        def __init__(self, text: TextModel, n: int, n_ctx: int) -> None:
            made.append((n, n_ctx))
            super().__init__(text, n, n_ctx)

    monkeypatch.setattr(sequences, "Sequences", Noted)
    answers = list(demo.ask_many(SCENES[:3], QUESTION, max_tokens=8))
    list(demo.ask_many(iter(SCENES[:3]), QUESTION, max_tokens=8, image_tokens=6))
    assert [n for n, _ in made] == [3, 16]
    assert made[0][1] - made[1][1] == 30  # 6 of 36 image tokens
    assert all(isinstance(answer, Answer) for answer in answers)

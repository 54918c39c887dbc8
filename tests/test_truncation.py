"""A conversation that no longer fits: the oldest turns go, never what is still spoken of."""

from __future__ import annotations

from collections.abc import Sequence

import pictures
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketllava import Bundle, ContextOverflow, Llava, Message, Options
from pocketllava.prompt.truncation import without_oldest


def words(messages: Sequence[Message]) -> int:
    """One token a word, 100 an image."""
    return sum(len(m.text.split()) + 100 * len(m.images) for m in messages)


def turn(n: int, *images: bytes) -> list[Message]:
    return [Message("user", f"question {n}", images), Message("assistant", f"answer {n}")]


def test_the_oldest_turns_go_first() -> None:
    talk = [Message("system", "Be brief."), *turn(1), *turn(2, b"i"), *turn(3), Message("user", "now")]
    assert without_oldest(talk, words, 1000) == talk
    assert without_oldest(talk, words, words(talk) - 1) == [talk[0], *talk[3:]]
    assert without_oldest(talk, words, 108) == [
        talk[0],
        *talk[3:5],
        talk[7],
    ]  # the picture is still spoken of
    assert without_oldest(talk, words, 1) == [talk[0], *talk[3:5], talk[7]]


def test_an_older_picture_goes_before_the_one_spoken_of() -> None:
    talk = [*turn(1, b"old"), *turn(2, b"new"), Message("user", "now")]
    assert without_oldest(talk, words, 150) == talk[2:]


messages = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(["user", "assistant"]),
        text=st.text("a ", max_size=9),
    )
    | st.builds(Message, role=st.just("user"), text=st.just("look"), images=st.just((b"i",)))
    | st.just(Message("system", "be kind")),
    max_size=9,
)


@given(talk=messages, room=st.integers(0, 400))
def test_no_more_goes_than_must(talk: list[Message], room: int) -> None:
    left = without_oldest(talk, words, room)
    assert [m for m in talk if any(m is kept for kept in left)] == left  # in order
    assert [m for m in left if m.role == "system"] == [m for m in talk if m.role == "system"]
    assert talk[-1:] == left[-1:]
    shown = [m for m in talk if m.images]
    assert not shown or shown[-1] in left
    if words(talk) <= room:
        assert left == talk


def test_a_long_conversation_goes_on_without_its_oldest_turns(bundle: Bundle) -> None:
    picture = pictures.four()[0]
    with Llava.load(bundle.folder, n_ctx=768) as llava:
        talk = [Message("system", "Be kind."), Message("user", "What is it?", (picture,))]
        shifted = Options(max_tokens=8, truncate="oldest")
        left_out = []
        for n in range(12):
            answer = llava.chat(talk, options=shifted)
            left_out.append(answer.timings.left_out)
            assert answer.timings.image_tokens == 576
            assert answer.timings.prompt_tokens < 768
            talk += [Message("assistant", answer.text), Message("user", f"{n}: " + "and then? " * 6)]
        assert left_out[0] == 0
        assert left_out[-1] >= 2
        with pytest.raises(ContextOverflow, match="do not fit a context of 768"):
            llava.chat(talk, options=Options(max_tokens=8))
        with pytest.raises(ContextOverflow):
            llava.chat([Message("user", "word " * 900)], options=shifted)


def test_a_text_that_no_context_holds_is_refused_before_it_is_tokenized(bundle: Bundle) -> None:
    endless = Message("user", "é€" * 4_000_000)  # libllama copies what it has for every byte of it: hours
    with Llava.load(bundle.folder, n_ctx=768) as llava:
        for options in (Options(), Options(truncate="oldest")):
            with pytest.raises(ContextOverflow) as caught:
                llava.chat([endless], options=options)
            assert caught.value.needed > 100_000
        later = [endless, Message("assistant", "I see."), Message("user", "What is it?")]
        answer = llava.chat(later, options=Options(max_tokens=4, truncate="oldest"))
        assert answer.timings.left_out == 2  # messages
        assert llava.count_tokens([Message("user", "word " * 4_000)]) > 4_000

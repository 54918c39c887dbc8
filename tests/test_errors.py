"""Errors: one printable line whatever they quote, and whole after pickling."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raising import ONE_OF_EACH, raise_number

from pocketllava import BundleError, InputError, PocketLlavaError, errors
from pocketllava.errors import MAX_CHARACTERS


def same(one: BaseException, other: BaseException) -> bool:
    return (type(one), one.args, one.__dict__) == (type(other), other.args, other.__dict__)


def test_here_is_one_of_each() -> None:
    tree = {
        e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.PocketLlavaError)
    }
    assert {type(error) for error in ONE_OF_EACH} == tree


@pytest.mark.parametrize("error", ONE_OF_EACH, ids=lambda e: type(e).__name__)
def test_errors_pickle_with_their_fields(error: PocketLlavaError) -> None:
    assert same(pickle.loads(pickle.dumps(error)), error)


def test_errors_come_back_from_a_workers_process() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for n, error in enumerate(ONE_OF_EACH):
            with pytest.raises(type(error)) as caught:
                pool.map_async(raise_number, [n]).get(timeout=60)
            assert same(caught.value, error)


@given(st.text() | st.text(st.characters(categories=["Cc", "Cs", "Cf", "Zl", "Zp"]), max_size=5000))
def test_messages_are_one_printable_line(text: str) -> None:
    message = str(InputError(f"file: found {text!s}, expected another"))
    assert message.isprintable()
    assert len(message) <= MAX_CHARACTERS
    assert message.startswith("file: found")
    assert message.endswith("expected another")


def test_long_messages_keep_their_beginning_and_their_end() -> None:
    message = str(BundleError(f"model.gguf: found {'x' * 400_000}\x1b[31m\nexpected less; convert again"))
    assert message.startswith("model.gguf: found xxx")
    assert message.endswith(r"xxx\x1b[31m expected less; convert again")
    assert 900 < len(message) <= MAX_CHARACTERS


def test_what_prints_stays_as_it_is() -> None:
    text = "Größe: 3 × 4, 漢字 — “quoted” 🙂"
    assert str(InputError(text)) == text
    assert str(InputError("name\udc80.png: not found")) == r"name\udc80.png: not found"

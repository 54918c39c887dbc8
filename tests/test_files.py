"""A file is there whole under its name, or what was there before still is."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketllava.models.files import atomic_write


def test_takes_the_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with atomic_write(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("reason", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_when_writing_fails(tmp_path: Path, reason: BaseException) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as part:
            part.write_text("ne")
            raise reason

    with pytest.raises(type(reason)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_write(path) as one, atomic_write(path) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]

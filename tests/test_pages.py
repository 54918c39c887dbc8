"""Files that are compared with the disk while they are written: whole when all is well, refused when a byte differs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketllava import ConvertError
from pocketllava.convert.write import pages

PIECES = st.lists(st.binary(max_size=9000), max_size=12)


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Iterator[None]:
    """So that a few kilobytes go through all that gigabytes do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "BLOCK_BYTES", 4096)
        patch.setattr(pages, "FLUSH_BYTES", 10_000)
        yield


@given(there=st.binary(max_size=9000), cut=st.integers(0, 9000), pieces=PIECES)
def test_what_was_there_and_what_is_written_is_the_file(there: bytes, cut: int, pieces: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, at = Path(folder) / "file", min(cut, len(there))
        path.write_bytes(there)
        file = pages.Checked(path, at)
        for piece in pieces:
            file.write(piece)
        file.finish()
        file.close()
        assert path.read_bytes() == there[:at] + b"".join(pieces)
        assert file.end == path.stat().st_size


@given(there=st.binary(max_size=9000), piece=st.binary(min_size=1, max_size=9000), data=st.data())
def test_a_byte_that_changes_is_found(there: bytes, piece: bytes, data: st.DataObject) -> None:
    spoilt = data.draw(st.integers(len(there), len(there) + len(piece) - 1))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(there)
        file = pages.Checked(path, len(there))
        file.write(piece)
        file.flush()
        with path.open("r+b") as other:
            other.seek(spoilt)
            other.write(bytes([piece[spoilt - len(there)] ^ data.draw(st.integers(1, 255))]))
        with pytest.raises(ConvertError, match="the disk holds something else"):
            file.finish()
        file.close()


def test_a_file_that_was_cut_off_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    file = pages.Checked(path, 0)
    file.write(b"x" * 9000)
    file.flush()
    with path.open("r+b") as other:
        other.truncate(5000)
    with pytest.raises(ConvertError, match="from byte 4096 on the disk holds something else"):
        file.finish()
    file.close()

"""Files written in order and flushed on the way: what was written is the file, also where an earlier one continues."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pocketllava.convert.write.durable import FLUSH_BYTES, DurableFile


@given(
    before=st.binary(max_size=500),
    end=st.integers(0, 500),
    pieces=st.lists(st.binary(max_size=500), max_size=6),
)
def test_it_continues_after_a_byte(before: bytes, end: int, pieces: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, end = Path(folder) / "file", min(end, len(before))
        path.write_bytes(before)
        file = DurableFile(path, end)
        for piece in pieces:
            file.write(piece)
        file.finish()
        file.close()
        assert path.read_bytes() == before[:end] + b"".join(pieces)
        assert file.end == path.stat().st_size


def test_a_file_that_is_flushed_several_times(tmp_path: Path) -> None:
    block = os.urandom(FLUSH_BYTES // 4 + 1)
    file = DurableFile(tmp_path / "file", 0)
    for _ in range(10):
        file.write(block)
    file.finish()
    file.close()
    assert (tmp_path / "file").read_bytes() == block * 10

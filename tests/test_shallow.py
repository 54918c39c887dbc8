"""The load test of a large vision tower: opened whole, encoding with its first block, in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocketllava import Bundle
from pocketllava.convert.write import shallow
from pocketllava.models.gguf_header import Header
from pocketllava.models.mmproj_contract import check_mmproj

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory with a name here")
LOAD = (
    "import sys; from pocketllava.convert.write import load_test, shallow;"
    "shallow.LARGE_BYTES = 0; load_test.main(*sys.argv[1:])"
)


def load(model: Path, mmproj: Path) -> subprocess.CompletedProcess[str]:
    """The load test, as if the file were a large one."""
    command = [sys.executable, "-c", LOAD, str(model), str(mmproj)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_tower_of_one_block(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shallow.shallow(bundle.mmproj) is None  # small enough to be tested whole
    monkeypatch.setattr(shallow, "LARGE_BYTES", 0)
    place = shallow.shallow(bundle.mmproj)
    assert place
    copy, whole = Header.read(place), Header.read(bundle.mmproj)
    assert check_mmproj(copy).n_blocks == 1
    assert check_mmproj(whole).n_blocks == 2
    assert set(copy.tensors) == {name for name in whole.tensors if not name.startswith("v.blk.1.")}
    same = set(whole.keys) - {shallow.DEPTH, shallow.FEATURES}
    assert {n: copy.keys[n] for n in same} == {n: whole.keys[n] for n in same}


def test_it_loads_and_what_lies_deeper_is_missed(bundle: Bundle, tmp_path: Path) -> None:
    done = load(bundle.model, bundle.mmproj)
    assert done.returncode == 0, done.stderr
    data = bundle.mmproj.read_bytes()
    spoiled = tmp_path / "mmproj.gguf"
    spoiled.write_bytes(data.replace(b"v.blk.1.attn_out.weight", b"v.blk.1.attn_oug.weight"))
    refused = load(bundle.model, spoiled)
    assert refused.returncode
    assert "libmtmd refuses it" in refused.stderr

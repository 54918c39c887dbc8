"""The load test of a large vision tower: opened entirely, encoding with its first block, in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pocketllava import Bundle
from pocketllava.llamacpp.children import ChildResult, run_child
from pocketllava.llamacpp.load_test import DEPTH, FEATURES, FUNCTION, shallow_copy
from pocketllava.models.gguf_header import Header
from pocketllava.models.mmproj_contract import check_mmproj

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory with a name here")


def load(model: Path, mmproj: Path) -> ChildResult:
    """The load test, as if the file were a large one."""
    return run_child(FUNCTION, model, mmproj, "0")


def test_a_tower_of_one_block(bundle: Bundle) -> None:
    assert shallow_copy(bundle.mmproj) is None  # small enough to be tested entirely
    path = shallow_copy(bundle.mmproj, 0)
    assert path
    copy, original = Header.read(path), bundle.mmproj_header
    assert check_mmproj(copy).n_blocks == 1
    assert check_mmproj(original).n_blocks == 2
    assert set(copy.tensors) == {name for name in original.tensors if not name.startswith("v.blk.1.")}
    same = set(original.keys) - {DEPTH, FEATURES}
    assert {n: copy.keys[n] for n in same} == {n: original.keys[n] for n in same}
    for name, info in copy.tensors.items():
        assert tensor_bytes(copy, name) == tensor_bytes(original, name), info


def tensor_bytes(header: Header, name: str) -> bytes:
    """A tensor's data."""
    info = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(header.data_start + info.offset)
        return file.read(info.n_bytes)


def test_it_loads_and_a_deeper_tensor_is_missed(bundle: Bundle, tmp_path: Path) -> None:
    result = load(bundle.model, bundle.mmproj)
    assert result.answer is True, result.reason
    spoiled = tmp_path / "mmproj.gguf"
    spoiled.write_bytes(
        bundle.mmproj.read_bytes().replace(b"v.blk.1.attn_out.weight", b"v.blk.1.attn_oug.weight")
    )
    refused = load(bundle.model, spoiled)
    assert refused.answer is None
    assert refused.last_line == f"{spoiled}: libmtmd refuses it"

"""The cache folder: whole files or none, bounded, shared by processes, and never a reason to fail."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocketllava.models.blob_cache import PART, STALE_S, SUFFIX, BlobCache

ROOMY = 1 << 20


@given(data=st.binary(max_size=1000), name=st.text("abc0", min_size=1, max_size=8))
def test_what_was_put_comes_back(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    store = BlobCache(tmp_path_factory.mktemp("store"), ROOMY)
    assert store.get(name) is None
    store.put(name, data)
    assert store.has(name)
    assert BlobCache(store.folder, ROOMY).get(name) == data


@given(data=st.binary(min_size=1, max_size=200), at=st.integers(0, 10_000), cut=st.booleans())
def test_a_damaged_file_is_thrown_away(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int, cut: bool
) -> None:
    store = BlobCache(tmp_path_factory.mktemp("store"), ROOMY)
    store.put("a", data)
    path = store.folder / f"a{SUFFIX}"
    whole = bytearray(path.read_bytes())
    at %= len(whole)
    path.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert store.get("a") is None
    assert not path.exists()


def test_a_renamed_file_is_a_damaged_one(tmp_path: Path) -> None:
    store = BlobCache(tmp_path, ROOMY)
    store.put("a", b"picture of a")
    (tmp_path / f"a{SUFFIX}").rename(tmp_path / f"b{SUFFIX}")
    assert store.get("b") is None


def test_the_oldest_go_first(tmp_path: Path) -> None:
    store = BlobCache(tmp_path, 3 * 200)
    for n, name in enumerate("abc"):
        store.put(name, bytes(100))
        os.utime(tmp_path / f"{name}{SUFFIX}", (n, n))
    assert store.get("a") is not None  # used now
    store.put("d", bytes(100))
    assert [store.has(name) for name in "abcd"] == [True, False, True, True]
    store.put("huge", bytes(1000))
    assert [store.has(name) for name in ("a", "c", "d", "huge")] == [True, True, True, False]


def test_part_files_of_dead_processes_go(tmp_path: Path) -> None:
    for name, age_s in (("old", 2 * STALE_S), ("new", 0.0)):
        (tmp_path / f"{name}{PART}").write_bytes(b"half")
        then = time.time() - age_s
        os.utime(tmp_path / f"{name}{PART}", (then, then))
    BlobCache(tmp_path, ROOMY).put("a", b"a")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"a{SUFFIX}", f"new{PART}"])


def test_other_peoples_files_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "thesis.txt").write_bytes(bytes(5000))
    store = BlobCache(tmp_path, 1000)
    for name in "abcdefgh":
        store.put(name, bytes(300))
    assert (tmp_path / "thesis.txt").stat().st_size == 5000
    assert "holds other files too; they are left alone" in caplog.text


def test_a_folder_that_cannot_be_used_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = BlobCache(tmp_path / "file", ROOMY)
    for _ in range(3):
        store.put("a", b"a")
        assert store.get("a") is None
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 2  # at the beginning, and at the first put
    assert all(str(tmp_path / "file") in r.getMessage() for r in warnings)


FULL = """
import resource, sys
from pathlib import Path
from pocketllava.models.blob_cache import BlobCache
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a full disk: writing ends in the middle
store = BlobCache(Path(sys.argv[1]), 1 << 20)
store.put("big", bytes(5000))
store.put("small", b"fits")
assert store.get("big") is None
assert store.get("small") == b"fits"
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes the POSIX way")
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], check=True)
    assert [p.name for p in tmp_path.iterdir()] == [f"small{SUFFIX}"]


CHURN = """
import sys
from pathlib import Path
from pocketllava.models.blob_cache import BlobCache
store, seed = BlobCache(Path(sys.argv[1]), 30_000), int(sys.argv[2])
for n in range(60):
    name = str((n * seed) % 7)
    expected = name.encode() * 5000
    found = store.get(name)
    assert found is None or found == expected
    store.put(name, expected)
"""


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", CHURN, str(tmp_path), str(seed)], stderr=subprocess.PIPE)
        for seed in (1, 2, 3)
    ]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [(b"", 0)] * 3
    BlobCache(tmp_path, 30_000).put("0", b"0" * 5000)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 30_000
    assert not list(tmp_path.glob(f"*{PART}"))

"""Memory that comes back, and the endurance run of benchmarks/soak.py, a minute's worth of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pocketllava import Llava

SOAK = Path(__file__).parent.parent / "benchmarks" / "soak.py"
COUNTS = {"images": 24, "conversations": 6, "loads": 6, "restarts": 4}


def megabytes() -> float:
    return float(psutil.Process().memory_info().rss / 1e6)


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries give memory back by themselves")
def test_a_closed_model_s_memory_is_given_back() -> None:
    for _ in range(2):  # the first one imports
        empty = megabytes()
        with Llava.load("demo", n_ctx=1024, n_threads=1, weights="memory") as model:
            model.ask(None, "What is this?", max_tokens=4)
            loaded = megabytes()
    assert loaded > empty + 20
    assert megabytes() < empty + 4


@pytest.mark.slow
def test_the_endurance_run_measures_every_part(tmp_path: Path) -> None:
    results = tmp_path / "soak.json"
    counts = [text for part, n in COUNTS.items() for text in (f"--{part}", str(n), "--only", part)]
    command = [sys.executable, str(SOAK), *counts, "--checks", "3", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    rows = json.loads(results.read_text("utf-8"))
    assert {part: row["n"] for part, row in rows.items()} == COUNTS, done.stderr
    assert all(row["equal"] + row["ties"] == row["checked"] == 3 for row in rows.values()), done.stderr
    assert done.stdout.count("\n| ") == 1 + len(COUNTS)
    again = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=20)
    assert again.stdout == done.stdout  # nothing is run twice

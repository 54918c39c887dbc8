"""Damaged checkpoints end in one line, quickly, in little memory, and leave nothing behind.

POCKETLLAVA_DAMAGED sets how many, POCKETLLAVA_SEED which; `make attack` tries 100, and 2,000 were run by hand.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import damage
import pytest
import small_checkpoint

NUMBER = int(os.environ.get("POCKETLLAVA_DAMAGED", "15"))
SEED = os.environ.get("POCKETLLAVA_SEED", "0")
GIGA = 1_000_000_000


def test_damaged_checkpoints(tmp_path: Path) -> None:
    script = Path(__file__).parent / "damage.py"
    command = [sys.executable, str(script), SEED, str(NUMBER), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{ {k: v for k, v in found.items() if k != 'wrong'} }")
    assert found["wrong"] == []
    assert found["refused"] + found["converted"] == NUMBER
    assert found["refused"] > NUMBER / 4
    assert found["peak_bytes"] < GIGA


@pytest.mark.parametrize("case", ["0 11", "0 98", "1 394", "2 7", "2 230"])
def test_what_once_was_a_traceback_or_several_lines(tmp_path: Path, case: str) -> None:
    folder = small_checkpoint.write(tmp_path / "damaged", layers=1, ffn=256)
    damage.spoil(random.Random(case), folder)
    assert damage.outcome(folder, tmp_path / "out") in (
        "refused",
        "converted",
    )  # some are none of our business now

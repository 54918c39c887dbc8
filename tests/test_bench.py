"""`pocketllava bench` measures every stage, on the real command; how fast they are is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
from PIL import Image

from pocketllava import Llava
from pocketllava.bench import Figure, bench, peak_bytes, unseen

NAMES = [
    "image preparation", "image encoding", "prompt evaluation", "first token, new image", "first token, second question",
    "preparing an image", "first token, prepared image", "first token, back to an earlier image", "decoding",
    "peak memory",
]  # fmt: skip


def run(*arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pocketllava.cli",
        "bench",
        "demo",
        "-n",
        "2",
        "--tokens",
        "16",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # no bar without a terminal
    return done.stdout


def test_the_command_gives_every_figure() -> None:
    found = json.loads(run("--json"))
    assert list(found["figures"]) == NAMES
    assert {"cpu", "cores", "pocketllava", "llama-cpp-python", "model", "types", "device"} <= set(
        found["machine"]
    )
    for name, figure in found["figures"].items():
        assert 0 < figure["min"] <= figure["median"] <= figure["max"], name
        assert len(figure["values"]) == (1 if name == "peak memory" else 2)
    shown = run()
    assert all(name in shown for name in NAMES)
    assert "device: CPU, " in shown


def test_every_run_shows_something_new(llava: Llava) -> None:
    """Nothing that is called cold was ever computed, and nothing that is called kept is computed again."""
    picture = Image.fromarray(np.zeros((200, 300, 3), np.uint8))
    versions = {unseen(picture).tobytes() for _ in range(5)}
    assert len(versions) == 5
    encoder = llava._handler.vision(llava._llama).correction
    before, done = encoder.corrected, []
    bench(llava, picture, runs=2, tokens=2, progress=lambda: done.append(1))
    assert encoder.corrected - before == 2 * 2  # a new picture and a prepared one a run
    assert len(done) == 2


def test_medians() -> None:
    assert Figure("a", "s", (3.0, 1.0, 2.0)).to_json() == {
        "unit": "s", "median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0],
    }  # fmt: skip
    assert peak_bytes() > 10_000_000

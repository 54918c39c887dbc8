"""Every program in examples/ runs with its defaults, the demo model and the drawn scene, and prints its answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
DESCRIPTION = (
    "There is a large green number 1 at the top, a large green square at the left, a small blue square at the"
    " center and a small red square at the right on a gray background."
)
ANSWERS = (
    "What is at the center? a blue square",
    "How many objects are there? 4",
    "What number is written? 1",
)
EXPECTED = {  # lines, or how they begin
    "ask": ("What is at the center? a blue square", "How big is it? small", "53 of 62 prompt tokens"),
    "async_stream": (DESCRIPTION, "the event loop stayed free: True"),
    "cache_folder": (
        "first: a blue square (0 of ",
        "second: a blue square (40 of ",
        "in the folder: .cached, ",
    ),
    "chat_handler": ("a blue square",),
    "errors": ("model: no-such-model", "image: ", "prompt: needs ", "other: ", "still loaded: a blue square"),
    "folder": ('{"image": "scene.png", "caption": "' + DESCRIPTION,),
    "processes": ANSWERS,
    "show_log": ("a blue square", "llama.cpp logged lines: True"),
    "stream_to_gui": (DESCRIPTION, "[stop]"),
    "threads": ANSWERS,
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_it_prints_what_it_should(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(EXPECTED[name]), done.stdout
    for line, beginning in zip(lines, EXPECTED[name], strict=True):
        assert line.startswith(beginning)


@pytest.mark.parametrize("name", EXPECTED)
def test_it_is_short_and_says_how_it_is_started(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert f"python examples/{name}.py [MODEL IMAGE]" in text
    assert len(text.splitlines()) <= 60

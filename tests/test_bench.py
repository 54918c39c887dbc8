"""`pocketllava bench` measures every stage, on the real command; how fast they are is no test's business."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import machines
import numpy as np
from PIL import Image

from pocketllava import Answer, Bundle, Llava, Timings
from pocketllava.commands.show import figure_lines
from pocketllava.measure.speed import (
    STEPS_PER_RUN,
    Figure,
    answers,
    bench,
    decoding_speed,
    jpeg,
    peak_bytes,
    unseen,
)
from pocketllava.types import FinishReason
from pocketllava.vision.image import preprocess

PHOTO = str(Path(__file__).parent / "photo.jpg")
ONCE = ("load", "peak memory")
NAMES = [
    "load", "image preparation", "image encoding", "prompt", "of them the image", "prompt evaluation",
    "first token, new image", "first token, second question", "kept for the second question", "preparing an image",
    "first token, prepared image", "kept for the prepared image", "first token, back to an earlier image",
    "kept for the earlier image", "decoding", "peak memory",
]  # fmt: skip


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "pocketllava.cli", "bench", *arguments, "-n", "2", "--tokens", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # no bar without a terminal
    return done.stdout


def test_the_command_gives_every_figure(bundle: Bundle) -> None:
    found = json.loads(run(str(bundle.folder), "--image", PHOTO, "--json"))
    assert list(found["figures"]) == NAMES
    assert {"cpu", "cores", "system", "python", "pocketllava", "llama-cpp-python"} <= set(found["machine"])
    assert {"model", "types", "text", "vision", "n_ctx", "runs", "tokens"} <= set(found["machine"])
    for name, figure in found["figures"].items():
        assert 0 < figure["min"] <= figure["median"] <= figure["max"], name
        assert len(figure["values"]) == (1 if name in ONCE else 2)
    tokens = {name: figure["min"] for name, figure in found["figures"].items() if figure["unit"] == "tokens"}
    assert tokens["of them the image"] == 576
    for kept in ("second question", "prepared image", "earlier image"):
        assert 576 < tokens[f"kept for the {kept}"] < tokens["prompt"]


def test_the_table_shows_every_figure() -> None:
    shown = run("demo")
    assert all(name in shown for name in NAMES)
    assert f"text: {machines.text_place()}" in shown
    assert "vision: " in shown


def test_every_run_shows_something_new(llava: Llava) -> None:
    """Nothing that is called new was ever computed, and nothing that is called kept is computed again."""
    picture = Image.fromarray(np.zeros((200, 300, 3), np.uint8))
    with llava.session() as session:
        encoder = session.vision.correction
    before, done = encoder.corrected, []
    bench(llava, picture, runs=2, tokens=2, progress=lambda: done.append(1))
    assert encoder.corrected - before == 2 * 2  # a new picture and a prepared one a run
    assert len(done) == 2 * STEPS_PER_RUN


def test_unseen_pictures_stay_different_when_they_are_made_smaller(bundle: Bundle) -> None:
    large = Image.new("RGB", (5000, 2000))
    pixels = {preprocess(jpeg(unseen(large)), bundle.preprocessing).tobytes() for _ in range(3)}
    assert len(pixels) == 3
    assert Image.open(io.BytesIO(jpeg(unseen(Image.new("L", (1, 1)))))).size == (1, 1)


def answer(n: int, finish: FinishReason, decode_s: float) -> Answer:
    return Answer("", tuple(range(n)), Timings(decode_s=decode_s, answer_tokens=n), finish)


def test_decoding_speed_needs_enough_tokens() -> None:
    assert decoding_speed([answer(11, "length", 2.0)]) == 5.0
    assert decoding_speed([answer(10, "stop", 2.0)]) == 5.0  # the end is a token, too
    assert decoding_speed([answer(5, "length", 1.0), answer(4, "stop", 1.0)]) == 4.0
    assert decoding_speed([answer(0, "stop", 0.0)] * 4) is None
    asked: list[str] = []

    def ask(question: str) -> Answer:
        asked.append(question)
        return answer(6, "stop", 1.0)

    assert len(answers(ask, answer(9, "length", 1.0))) == 1
    assert len(answers(ask, answer(3, "stop", 1.0))) == 2
    assert len(asked) == len(set(asked)) == 1


def test_figures() -> None:
    figure = Figure("a", "s", (3.0, 1.0, 2.0))
    assert figure.to_json() == {"unit": "s", "median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}
    nothing = Figure("decoding", "tokens/s", ())
    assert nothing.to_json() == {"unit": "tokens/s", "median": None, "min": None, "max": None, "values": []}
    assert figure_lines({}, [nothing])[-1].split() == ["decoding", "-", "-", "-", "tokens/s"]
    assert peak_bytes() > 10_000_000

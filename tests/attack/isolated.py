"""Attacks a model in this process and in a child: calls ended at random moments, and a thousand calls in a row.

    PYTHONPATH=$PWD/tests python -m attack.isolated CAMPAIGN [CASES [SEED]]

A case is *accepted* if the call ended soon, and the next answer is that of a model nobody disturbed.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from attack.counts import Counts
from attack.steps import work_left_s
from pictures import scene
from processes import cpu_s

from pocketllava import Llava, Message, Options
from pocketllava.types import Progress

QUESTION = "What is at the center?"
PHASES = ("waiting", "image", "prompt", "decoding")
LOOKS = 8  # at should_stop() once it is true; llama.cpp looks before each node of a graph, of which a step has hundreds
ENDS_S = 20.0  # by the clock
PICTURES, SETTLED = 100, 200  # asked about in turn, and calls until the features of all are kept
SLACK_MB, SLACK_FILES = 16, 2


def cancels(seed: int, cases: int, folder: Path) -> Counts:
    """So many in each phase, in this process and in a child."""
    counts, rng = Counts(), random.Random(seed)
    for isolated in (False, True):
        with Llava.load("demo", n_ctx=2048, n_threads=1, isolated=isolated) as model:
            picture = np.asarray(scene(96, 80))
            expected = model.ask(picture, QUESTION, max_tokens=8).token_ids
            child = _newest_child() if isolated else None
            # a child cannot be asked how often it looked
            most_s = work_left_s(child, partial(model.ask, *_long(rng), max_tokens=1)) if child else 0.0
            for n in range(cases * len(PHASES)):
                counts.cases += 1
                name = f"{PHASES[n % len(PHASES)]}, isolated {isolated}, case {n}"
                _cancel(model, PHASES[n % len(PHASES)], rng, name, counts, child, most_s)
                if model.ask(picture, QUESTION, max_tokens=8).token_ids != expected:
                    counts.wrong += 1
                    counts.failures.append(f"{name}: another answer afterwards")
    return counts


def _cancel(
    model: Llava, phase: str, rng: random.Random, name: str, counts: Counts,
    child: psutil.Process | None, most_s: float,
) -> None:  # fmt: skip
    """Ask for something long and end it amid a phase: as soon as its first sign is seen, or a moment later.

    The child, if the model is in one, may work for most_s more.
    """
    stop, seen, looks = threading.Event(), [0.0, 0.0], [0]
    delay = rng.uniform(0, 0.02)

    def end() -> None:
        seen[:] = time.monotonic(), _worked_s(child)
        stop.set()

    def cancel() -> None:
        if not seen[0]:
            seen[0] = 1.0
            threading.Timer(delay, end).start()

    def should_stop() -> bool:
        looks[0] += stop.is_set()
        return stop.is_set()

    def on_progress(progress: Progress) -> None:
        if progress.stage == phase:
            cancel()

    picture, text = _long(rng)
    if phase == "waiting":
        cancel()
    reason: str | None = None
    options = Options(max_tokens=900, schema={"type": "string", "minLength": 900}, temperature=1.5)
    stream = model.stream(
        [Message("user", text, picture)], options=options, should_stop=should_stop, on_progress=on_progress
    )
    for chunk in stream:
        reason = chunk.finish_reason
        if phase == "decoding":
            cancel()
    took, worked = time.monotonic() - seen[0], _worked_s(child) - seen[1]
    if took > ENDS_S or worked > most_s or (looks[0] > LOOKS and child is None):
        counts.hangs += 1
        counts.failures.append(f"{name}: ended after {took:.2f} s, {worked:.2f} s of work, {looks[0]} looks")
    elif reason != "cancelled":
        counts.wrong += 1
        counts.failures.append(f"{name}: ended as {reason}")
    else:
        counts.accepted += 1


def calls(seed: int, cases: int, folder: Path) -> Counts:
    """A model in a child, asked again and again: neither process takes more memory or descriptors."""
    counts = Counts()
    with Llava.load("demo", n_ctx=512, n_threads=1, isolated=True) as model:
        own = psutil.Process()
        child = _newest_child()
        sizes: list[tuple[Any, ...]] = []
        for n in range(cases):
            picture = np.random.default_rng((seed, n % PICTURES)).integers(0, 255, (64, 64, 3), np.uint8)
            counts.cases += 1
            counts.accepted += bool(model.ask(picture, QUESTION, max_tokens=4).token_ids)
            if n % 20 == 19:
                sizes.append((*_size(own), *_size(child)))
    settled = sizes[min(SETTLED // 20, len(sizes) // 2)]
    for name, early, late in zip(
        ("MB", "files", "child's MB", "child's files"), settled, sizes[-1], strict=True
    ):
        print(f"{name}: {early:.0f}, in the end {late:.0f}", file=sys.stderr)
        if late > early + (SLACK_MB if "MB" in name else SLACK_FILES):
            counts.leaks += 1
            counts.failures.append(f"{name}: {early:.0f} after some calls, {late:.0f} in the end")
    return counts


def _long(rng: random.Random) -> tuple[Any, str]:
    """A new picture and a long question."""
    picture = np.random.default_rng(rng.randrange(1 << 30)).integers(0, 255, (300, 300, 3), np.uint8)
    return picture, " ".join(rng.choices(["red", "star", "left", "circle"], k=500))


def _newest_child() -> psutil.Process:
    """That of the model loaded last."""
    return max(psutil.Process().children(), key=lambda p: p.create_time())


def _worked_s(child: psutil.Process | None) -> float:
    """Seconds of work of a child, if there is one."""
    return cpu_s(child) if child is not None else 0.0


def _size(process: psutil.Process) -> tuple[float, int]:
    """(MB in memory, open descriptors)."""
    return process.memory_info().rss / 1e6, process.num_handles() if os.name == "nt" else process.num_fds()


CAMPAIGNS: dict[str, tuple[Callable[[int, int, Path], Counts], int]] = {
    "cancelled calls": (cancels, 50),
    "calls in a row": (calls, 1000),
}

if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    campaign, usual = CAMPAIGNS[name]
    start = time.monotonic()
    found = campaign(
        int(numbers[1]) if len(numbers) > 1 else 0, int(numbers[0]) if numbers else usual, Path()
    )
    print(*found.failures[:20], sep="\n")
    print(name, {**vars(found), "failures": len(found.failures)}, f"{time.monotonic() - start:.0f} s")

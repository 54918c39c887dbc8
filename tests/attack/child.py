"""Runs the cases of a campaign in a child process, which a signal or a hang may end, and counts how each ended.

Knows no input. A target makes a case from a random number generator and uses it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attack.counts import Counts

from pocketllava import PocketLlavaError

MAX_S, HANG_S = 2.0, 30.0
MAX_CHARACTERS = 1000  # of an error
TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Target:
    """What is attacked. make: a case's bytes; use: raises PocketLlavaError, or AssertionError for a wrong result."""

    make: Callable[[random.Random], bytes]
    use: Callable[[bytes, Path], None]


def outcome(target: Target, data: bytes, folder: Path) -> tuple[str, str]:
    """(a field of Counts, what is wrong) of one case."""
    start = time.process_time()
    try:
        target.use(data, folder)
        kind, detail = "accepted", ""
    except PocketLlavaError as error:
        kind, detail = "refused", ""
        if "\n" in str(error) or len(str(error)) > MAX_CHARACTERS:
            kind, detail = "wrong", f"not one line: {str(error)[:200]!r}"
    except AssertionError as error:
        kind, detail = "wrong", str(error)[:500]
    except Exception:
        kind, detail = "tracebacks", traceback.format_exc(limit=-4)
    took = time.process_time() - start
    return ("hangs", f"took {took:.1f} s") if took > MAX_S else (kind, detail)


def serve(targets: dict[str, Target], seed: int, cases: int, first: int, folder: Path) -> None:
    """In the child: every target's cases, from number `first` of them all on, with a line after each."""
    for number in range(first, cases * len(targets)):
        name, n = list(targets)[number // cases], number % cases
        data = targets[name].make(random.Random(f"{seed} {n}"))
        place = folder / name.replace(" ", "-")
        place.mkdir(exist_ok=True)
        (place / "case").write_bytes(data)
        kind, detail = outcome(targets[name], data, place)
        if detail:  # here, since the next case is written while the parent reads of this one
            _keep(place, f"{name} {seed} {n}")
        print(json.dumps([number, kind, detail]), flush=True)


def campaign(script: Path, names: Sequence[str], seed: int, cases: int, folder: Path) -> dict[str, Counts]:
    """Run each name's cases in children of this script, `script --child SEED CASES FIRST FOLDER NAME...`.

    One child runs all of them, as starting one costs more than a hundred cases; after a crash another one goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts, first = {name: Counts(cases=cases) for name in names}, 0

    def case(number: int) -> tuple[str, str]:
        name = names[number // cases]
        return name, f"{name} {seed} {number % cases}"

    def count(number: int, kind: str, detail: str) -> None:
        name, words = case(number)
        setattr(counts[name], kind, getattr(counts[name], kind) + 1)
        if detail:
            counts[name].failures.append(f"{words}: {kind}: {detail}")

    while first < cases * len(names):
        words = ["--child", str(seed), str(cases), str(first), str(folder), *names]
        environment = os.environ | {"PYTHONPATH": str(TESTS)}
        with (folder / "stderr").open("wb") as chatter:  # libtiff has much to say
            child = subprocess.Popen(
                [sys.executable, str(script), *words], stdout=subprocess.PIPE, stderr=chatter, env=environment
            )
        for number, kind, detail in _answers(child):
            count(number, kind, detail)
            first = number + 1
        if first < cases * len(names):
            kind = "hangs" if child.wait() == -9 else "crashes"
            end = (folder / "stderr").read_text("utf-8", "replace")[-300:]
            count(first, kind, f"exit code {child.wait()} {end}")
            name, words = case(first)
            _keep(folder / name.replace(" ", "-"), words)
            first += 1
    return counts


def _answers(child: subprocess.Popen[bytes]) -> Iterator[tuple[int, str, str]]:
    """The lines of a child, which is killed where none comes for a while."""
    assert child.stdout is not None
    while True:
        watch = threading.Timer(HANG_S, child.kill)
        watch.start()
        line = child.stdout.readline()
        watch.cancel()
        if not line:
            child.stdout.close()
            child.wait()
            return
        yield json.loads(line)


def _keep(folder: Path, case: str) -> None:
    if (folder / "case").exists():
        (folder / "case").replace(folder / case.replace(" ", "-"))

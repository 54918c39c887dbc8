"""Five commands on a device of 1 to 64 MB: each ends in an answer or in one line, and no process by a signal.

    python -m devices.matrix FOLDER SMALL_DEVICE.SO      prints a table; exits 1 where a cell is neither

Every command runs on a device that keeps silent about its size, and on one that tells it. What answers must give the
tokens of a device without a limit. Knows commands and how processes end; nothing of what allocates.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attack import commands
from attack.commands import Setup
from devices.server import asked_of_a_server

# The last two have room for some layers, and for all but the vision tower.
SIZES_MB = (1, 12, 24, 30, 48, 56, 64)
LIMIT_S = 300.0
# Of a child whose end was caught: a message that names it is a fault, too. So are words that are ggml's, not ours.
SIGNAL = re.compile(r"\bSIG[A-Z]{3,4}\b|\bsignal \d+|GGML_ASSERT|Traceback|still running|^ggml", re.MULTILINE)
QUESTION = b"What is it?\n"


@dataclass(frozen=True)
class Ending:
    """How a command ended, and what it said: its answer, or its error."""

    returncode: int
    out: str
    messages: str

    @property
    def fault(self) -> str:
        """What is wrong with it; "" where it is an answer or one line."""
        if self.returncode < 0 or self.returncode >= 128:
            return f"signal {abs(self.returncode) % 128}"
        if found := SIGNAL.search(self.messages):
            return found[0]
        if len(self.errors) > 1 or (self.returncode and not self.errors):
            return f"{len(self.errors)} lines"
        return "" if self.errors or self.out.strip() else "no answer"

    @property
    def errors(self) -> list[str]:
        """Lines of error, after the plan and the warnings that explain it."""
        return [line for line in self.messages.splitlines() if line.startswith("error: ")]

    @property
    def word(self) -> str:
        """One word for the table."""
        return self.fault or ("one line" if self.errors else "answer")


Run = Callable[[Setup, Path, dict[str, str]], Ending]


def command(name: str, answer: Callable[[str, Path], str]) -> Run:
    """One of the attacks' commands; answer(stdout, its folder) is what must equal."""

    def run(setup: Setup, folder: Path, environment: dict[str, str]) -> Ending:
        program = commands.program(setup, commands.COMMANDS[name](setup, folder))
        try:
            done = subprocess.run(
                program, input=QUESTION, capture_output=True, env=environment, cwd=folder, timeout=LIMIT_S, check=False
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Ending(0, "", f"still running after {LIMIT_S:.0f} s")
        out = answer(done.stdout.decode(), folder) if done.returncode == 0 else ""
        return Ending(done.returncode, out, done.stderr.decode(errors="replace"))

    return run


def serve(setup: Setup, folder: Path, environment: dict[str, str]) -> Ending:
    """A server that is asked, and must be there afterwards."""
    program = commands.program(setup, ["serve", str(setup.bundle), "--port", "0"])
    returncode, out, messages = asked_of_a_server(program, setup.photo, environment, folder, LIMIT_S)
    return Ending(returncode, out, messages)


COMMANDS: dict[str, Run] = {
    "ask": command("ask", lambda out, _: out),
    "chat": command("chat", lambda out, _: out),
    "convert": command(
        "convert", lambda _, folder: " ".join(sorted(p.name for p in (folder / "new").iterdir()))
    ),
    "imatrix": command(
        "imatrix", lambda _, folder: "new.gguf" if (folder / "new.gguf").stat().st_size else ""
    ),
    "serve": serve,
}


def limited(environment: dict[str, str], shim: Path, megabytes: int, tells: bool) -> dict[str, str]:
    """The environment of a device that has so much."""
    own = {"LD_PRELOAD": str(shim), "SMALL_DEVICE_MB": str(megabytes)}
    return environment | own | ({"SMALL_DEVICE_TELLS": "1"} if tells else {})


def run(name: str, setup: Setup, folder: Path, environment: dict[str, str]) -> Ending:
    """In a new folder, with a home of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "home").mkdir(parents=True)
    ending = COMMANDS[name](setup, folder, commands.environment(folder / "home") | environment)
    (folder / "ending.json").write_text(json.dumps(vars(ending) | {"word": ending.word}, indent=1))
    return ending


def judged(ending: Ending, whole: Ending) -> str:
    """The cell's word; an answer that is another one is a fault."""
    differs = ending.word == "answer" and ending.out != whole.out
    return "another answer" if differs else ending.word


def main() -> None:
    """Run all, print the table and where the faults' outputs lie."""
    folder, shim = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    setup = commands.setup(folder / "setup")
    usual = {k: v for k, v in os.environ.items() if k.startswith(("GGML_", "VK_", "MESA_"))}
    faults: list[str] = []
    print(f"| device | {' | '.join(COMMANDS)} | s |\n|---|{'---|' * len(COMMANDS)}---|", flush=True)
    whole = {name: run(name, setup, folder / "whole" / name, usual) for name in COMMANDS}
    print(f"| no limit | {' | '.join(ending.word for ending in whole.values())} | |", flush=True)
    faults += [
        f"no limit, {name}: {ending.word}" for name, ending in whole.items() if ending.word != "answer"
    ]
    for tells in (False, True):
        for megabytes in SIZES_MB:
            start, words = time.perf_counter(), []
            device = f"{megabytes} MB{', told' if tells else ''}"
            for name in COMMANDS:
                place = folder / device.replace(", ", "-").replace(" ", "-") / name
                ending = run(name, setup, place, limited(usual, shim, megabytes, tells))
                words.append(judged(ending, whole[name]))
                if words[-1] not in ("answer", "one line"):
                    faults.append(f"{device}, {name}: {words[-1]} ({place / 'ending.json'})")
            print(f"| {device} | {' | '.join(words)} | {time.perf_counter() - start:.0f} |", flush=True)
    print("\n".join(["", *faults]) if faults else "\nall answers or one line, 0 signals")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()

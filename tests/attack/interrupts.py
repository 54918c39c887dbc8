"""Ctrl-C at random moments of every command: each ends within a second, with exit code 130, and leaves no half file.

python tests/attack/interrupts.py [seed] [cases]
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from attack.commands import COMMANDS, Setup, environment, program, setup
from attack.counts import Counts

from pocketllava import Bundle
from pocketllava.errors import PocketLlavaError
from pocketllava.models.gguf_header import Header

STOPS_S = 1.0  # of its own work; where the core is shared, that takes longer
FIRST_S = 0.02  # main() is called a moment after the launcher says so
TIMEOUT_S = 60.0
# So long that most moments fall into the work: answers of the small model go on until they are cut.
LONG = {
    "ask": ["-n", "1500"],
    "chat": ["-n", "1500"],
    "imatrix": ["--answer-tokens", "400", "--limit", "4"],
    "bench": ["-n", "9", "--tokens", "500"],
    "convert": ["-t", "1"],
    "quantize": ["-t", "1"],
}
NAMES = tuple(name for name in COMMANDS if " " not in name and not name.startswith("-"))
STARTED = "ATTACK_STARTED"  # has the launcher print a line to stderr before it calls main()


def run(seed: int, cases: int, folder: Path) -> Counts:
    """So many interrupts, the commands in turn, at moments drawn between a command's start and its usual end."""
    counts, rng = Counts(), random.Random(seed)
    prepared = setup(folder / "setup")
    usual = {}
    for n in range(cases):
        command = NAMES[n % len(NAMES)]
        if command not in usual:
            usual[command] = _duration(prepared, command, folder / "whole")
        moment = rng.uniform(FIRST_S, max(FIRST_S, usual[command]))
        place = folder / f"case{n}"
        place.mkdir()
        _judge(prepared, command, moment, place, counts)
        shutil.rmtree(place, ignore_errors=True)
    return counts


def _arguments(prepared: Setup, command: str, place: Path) -> list[str]:
    arguments = COMMANDS[command](prepared, place)
    for word in LONG.get(command, []):
        if word.startswith("-") and word in arguments:
            at = arguments.index(word)
            del arguments[at : at + 2]
    return [*arguments, *LONG.get(command, [])]


def _start(prepared: Setup, command: str, place: Path) -> subprocess.Popen[bytes]:
    """The command, once its first function is called: what comes before is Python's import of the package."""
    env = {**environment(prepared.home), "XDG_CACHE_HOME": str(place / "cache"), STARTED: "1"}
    process = subprocess.Popen(
        program(prepared, _arguments(prepared, command, place)),
        stdin=subprocess.PIPE if command == "chat" else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=place, env=env,
    )  # fmt: skip
    if process.stdin:
        process.stdin.write(b"Hello.\n" * 3)
        process.stdin.flush()
    assert process.stderr
    process.stderr.readline()
    return process


def _duration(prepared: Setup, command: str, place: Path) -> float:
    """Seconds that the command takes, at most five."""
    place.mkdir(exist_ok=True)
    process = _start(prepared, command, place)
    start = time.monotonic()
    try:
        process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return time.monotonic() - start


def _judge(prepared: Setup, command: str, moment: float, place: Path, counts: Counts) -> None:
    counts.cases += 1
    name = f"{command} after {moment:.3f} s"
    process = _start(prepared, command, place)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    sent, used = time.monotonic(), _cpu_s(process.pid)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        _, stderr = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        counts.hangs += 1
        counts.failures.append(f"{name}: not stopped after {TIMEOUT_S:.0f} s")
        return
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime - used
    waited, text = time.monotonic() - sent, stderr.decode("utf-8", "replace")
    if process.returncode == 130:
        counts.refused += 1
    elif process.returncode == 0:
        counts.accepted += 1  # it was done
    elif process.returncode < 0:
        counts.crashes += 1
        counts.failures.append(f"{name}: exit code {process.returncode}: {text[-300:]}")
    else:
        counts.wrong += 1
        counts.failures.append(f"{name}: exit code {process.returncode}: {text[-300:]}")
    if "Traceback" in text or "Exception ignored" in text:
        counts.tracebacks += 1
        counts.failures.append(f"{name}: {text[-500:]}")
    if min(waited, worked) > STOPS_S or waited > TIMEOUT_S / 2:
        counts.hangs += 1
        counts.failures.append(f"{name}: stopped after {waited:.2f} s, {worked:.2f} s of work")
    for half in _half_files(place, command):
        counts.wrong += 1
        counts.failures.append(f"{name}: left {half}")


def _cpu_s(pid: int) -> float:
    """Seconds of work of a running process; 0 where that is not known, so that all of its work counts."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _half_files(place: Path, command: str) -> list[str]:
    """What is neither whole nor a conversion that --resume goes on with."""
    half = []
    for path in place.iterdir():
        keeps = command in ("convert", "quantize") and path.name == ".new.partial"
        if path.name.startswith(".") and not keeps:
            half.append(path.name)
        try:
            if path.suffix == ".gguf":
                Header.read(path)
            elif path.name == "new":
                Bundle.open(path).check_hashes()
        except PocketLlavaError as error:
            half.append(str(error))
    return half


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as scratch:
        result = run(numbers[0] if numbers else 0, numbers[1] if len(numbers) > 1 else 50, Path(scratch))
    print(*result.failures, sep="\n")
    print(result)

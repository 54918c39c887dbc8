"""The tests on a device that is not the CPU, without hardware: Mesa's llvmpipe through Vulkan (`make devices`).

    PYTHONPATH=$PWD/tests python -m devices FOLDER

Builds llama-cpp-python with Vulkan once a version into FOLDER/VERSION, or takes POCKETLLAVA_DEVICE_WHEEL=FILE. Then runs
tests with exact arithmetic, counts tokens equal to transformers', and runs five commands on devices of 1 to 64 MB. Needs
nothing but Python; what the system lacks is one line. Exits 1 if anything failed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from devices import wheel
from devices.machine import PACKAGES, environment, missing

TESTS = ("vision", "answers", "prefixes", "streams", "cache", "device_caches", "imatrix", "cli")
COUNTS = re.compile(r"(\d+) (passed|failed|error|skipped|xfailed)")
MAX_FEATURES = 1e-3  # relative error in exact mode


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    result: str
    seconds: float
    is_well: bool


def main() -> None:
    """Look, build, run, print the table."""
    start = time.perf_counter()
    if lacks := missing(builds="POCKETLLAVA_DEVICE_WHEEL" not in os.environ):
        sys.exit(
            f"make devices: this machine lacks {', '.join(lacks)}; on Debian: apt-get install -y {PACKAGES}"
        )
    folder = Path(sys.argv[1]).resolve() / wheel.VERSION
    built = wheel.wheel(folder)
    folder.mkdir(parents=True, exist_ok=True)
    python, shim = wheel.environment_of(folder, built), wheel.shim(folder)
    rows = [*(tested(python, folder, name) for name in TESTS)]
    rows += [parity(python, folder, mode) for mode in ("exact", "default", "fast")]
    rows.append(small_devices(python, folder, shim))
    print("\n| on llvmpipe | result | s |\n|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.result} | {row.seconds:.0f} |")
    print(f"\n{(time.perf_counter() - start) / 60:.0f} minutes, llama-cpp-python {wheel.VERSION}, {folder}")
    sys.exit(not all(row.is_well for row in rows))


def tested(python: Path, folder: Path, name: str) -> Row:
    """One file of tests, with exact arithmetic."""
    start, command = time.perf_counter(), [str(python.with_name("pytest")), "-q", f"tests/test_{name}.py"]
    print(f"\ntests/test_{name}.py", flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(folder)) as child:
        assert child.stdout is not None
        last = ""
        for line in child.stdout:
            print(line, end="", flush=True)
            last = line if COUNTS.search(line) else last
    counts = ", ".join(f"{n} {word}" for n, word in COUNTS.findall(last)) or f"exit status {child.returncode}"
    return Row(f"tests/test_{name}.py", counts, time.perf_counter() - start, child.returncode == 0)


def parity(python: Path, folder: Path, mode: str) -> Row:
    """Greedy tokens over three checkpoints. Only exact arithmetic must give all of them."""
    start, name = time.perf_counter(), f"tokens and features, {mode}"
    command = [str(python), "-m", "devices.parity", str(folder / "parity"), mode]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env=environment(folder, exact=False), check=False
    )
    if done.returncode:
        return Row(name, f"exit status {done.returncode}", time.perf_counter() - start, False)
    print(f"\n{name}: {done.stdout}", flush=True)
    found = json.loads(done.stdout)
    errors, tokens = (found["features"], found["features_from_cpu"]), sum(found["tokens"])
    result = (
        f"{tokens} of {found['of']} tokens equal transformers', features {errors[0]:.1e} from theirs,"
        f" {errors[1]:.1e} from the CPU's"
    )
    well = tokens == found["of"] and max(errors) <= MAX_FEATURES
    return Row(name, result, time.perf_counter() - start, well or mode != "exact")


def small_devices(python: Path, folder: Path, shim: Path) -> Row:
    """Five commands on devices of seven sizes, their table printed as it grows."""
    start = time.perf_counter()
    print("\nsmall devices", flush=True)
    command = [str(python), "-m", "devices.matrix", str(folder / "matrix"), str(shim)]
    done = subprocess.run(command, env=environment(folder, exact=False), check=False)
    result = "all answers or one line, 0 signals" if done.returncode == 0 else "faults, see above"
    return Row("commands on devices of 1 to 64 MB", result, time.perf_counter() - start, done.returncode == 0)


if __name__ == "__main__":
    main()

"""Converting a checkpoint: pocketllava beside llama.cpp's own two steps, in one run, type by type.

    python benchmarks/against_llama_cpp.py CHECKPOINT --llama-cpp FOLDER --llama-quantize BINARY
        [--quant TYPE ...] [--runs N] [--work FOLDER]

FOLDER holds convert_hf_to_gguf.py, which needs torch and transformers; both come in the sdist of
llama-cpp-python under vendor/llama.cpp. The sides alternate, each beginning with a full page cache that holds
the checkpoint (pocketllava drops what it has read); medians of wall and CPU time, the peak of anonymous memory of all
processes at one moment (sampled; mapped files don't count) and the peak of temporary files are printed as a
Markdown table, with three ratios. POSIX only; anonymous memory on Linux only, elsewhere the peak resident
set. pocketllava also writes the mmproj and verifies and load-tests both files, which llama.cpp's steps do
not. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_S = 0.02


@dataclass
class Cost:
    """Of one command: seconds of wall and CPU time, peak bytes of anonymous memory of it and its children."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    temporary_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        peak, temporary = (
            max(self.peak_bytes, other.peak_bytes),
            max(self.temporary_bytes, other.temporary_bytes),
        )
        return Cost(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s, peak, temporary)


def run(*command: str | Path) -> Cost:
    """Run a command to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    peak, ended = [0], threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, peak, ended))
    sampler.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    ended.set()
    sampler.join()
    process.returncode = status
    if status:
        raise SystemExit(f"{' '.join(map(str, command))}: status {status}")
    resident = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak[0] or resident)


def _sample(pid: int, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_S):
        peak[0] = max(peak[0], _anonymous(pid))


def _anonymous(pid: int) -> int:
    """Anonymous and shared-memory bytes of a process and its children now (Linux; 0 elsewhere)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("ascii", "replace")
        children = [
            c for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()
        ]
    except OSError:
        return 0
    own = sum(int(kb) << 10 for kb in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))
    return own + sum(_anonymous(int(child)) for child in children)


def ours(checkpoint: Path, work: Path, quant: str) -> Cost:
    """One command."""
    command = ("convert", checkpoint, "--out", work / "bundle", "--quant", quant, "--quiet")
    cost = run(sys.executable, "-m", "pocketllava.cli", *command)
    shutil.rmtree(work / "bundle")
    return cost


def theirs(checkpoint: Path, work: Path, quant: str, converter: Path, quantizer: Path) -> tuple[Cost, Cost]:
    """F16 file, then llama-quantize: both steps' cost, and the second's alone."""
    half, final = work / "f16.gguf", work / "final.gguf"
    first = run(sys.executable, converter, checkpoint, "--outtype", "f16", "--outfile", half)
    second = run(quantizer, half, final, quant, str(os.cpu_count()))
    both = first + second
    both.temporary_bytes = half.stat().st_size
    half.unlink()
    final.unlink()
    return both, second


def warm(checkpoint: Path, ballast: Path) -> None:
    """Fill the page cache, with the checkpoint last: both sides begin as on a machine that has been up for a while.

    In a virtual machine memory that nobody has touched yet costs its first user 2 s of CPU time per GB.
    """
    with ballast.open("wb") as file:
        file.truncate(psutil.virtual_memory().total)  # sparse: takes page cache, no disk
    for path in (ballast, *sorted(checkpoint.glob("*.safetensors"))):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def table(quant: str, costs: dict[str, list[Cost]]) -> None:
    """Medians and ratios of one type."""
    fields = ("wall_s", "cpu_s", "peak_bytes", "temporary_bytes")
    runs = len(costs["pocketllava"])
    medians = {
        name: [statistics.median(getattr(c, f) for c in found) for f in fields]
        for name, found in costs.items()
    }
    print(
        f"\n| {quant}, median of {runs} | wall s | CPU s | peak anonymous MB | temporary MB |\n|---|---|---|---|---|"
    )
    for name, (wall, cpu, peak, temporary) in medians.items():
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {peak / 1e6:.0f} | {temporary / 1e6:.0f} |")
    mine, both, second = medians.values()
    print(f"\nwall time, against both steps: {mine[0] / both[0]:.2f} (goal 0.60)")
    print(f"CPU time, against llama-quantize alone: {mine[1] / second[1]:.2f} (goal 1.05)")
    print(f"CPU time, against both steps: {mine[1] / both[1]:.2f}")
    print(f"peak anonymous memory: {mine[2] / 1e6:.0f} MB (goal 400)", flush=True)


def main() -> None:
    """Alternate the two sides and print a table for each type."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("checkpoint", type=Path)
    ap.add_argument("--llama-cpp", type=Path, required=True)
    ap.add_argument("--llama-quantize", type=Path, required=True)
    ap.add_argument("--quant", nargs="+", default=["Q4_K_M", "Q8_0"])
    ap.add_argument("--runs", type=int, default=3)
    ap.add_argument(
        "--work", type=Path, help="where both sides write [default: the system's temporary folder]"
    )
    a = ap.parse_args()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("pocketllava", "llama-cpp-python"))
    print(f"{a.checkpoint.name}, {os.cpu_count()} cores ({platform.machine()}), {versions}", flush=True)
    converter = a.llama_cpp / "convert_hf_to_gguf.py"
    for quant in a.quant:
        costs: dict[str, list[Cost]] = {
            "pocketllava": [],
            "llama.cpp, two steps": [],
            "llama-quantize alone": [],
        }
        with tempfile.TemporaryDirectory(dir=a.work) as folder:
            for _ in range(a.runs):
                warm(a.checkpoint, Path(folder) / "ballast")
                costs["pocketllava"].append(ours(a.checkpoint, Path(folder), quant))
                warm(a.checkpoint, Path(folder) / "ballast")
                both, second = theirs(a.checkpoint, Path(folder), quant, converter, a.llama_quantize)
                costs["llama.cpp, two steps"].append(both)
                costs["llama-quantize alone"].append(second)
        table(quant, costs)


if __name__ == "__main__":
    main()

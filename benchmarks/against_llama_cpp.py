"""Converting a checkpoint to Q4_K_M (or another type): pocketllava beside llama.cpp's own two steps, in one run.

    python benchmarks/against_llama_cpp.py CHECKPOINT --llama-cpp FOLDER --llama-quantize BINARY [--runs N]

FOLDER holds convert_hf_to_gguf.py, which needs torch and transformers; both come in the sdist of
llama-cpp-python under vendor/llama.cpp. The sides alternate; medians of wall and CPU time and the peak
resident memory of the largest process are printed as a Markdown table. POSIX only. pocketllava also
writes the mmproj and verifies both files, which llama.cpp's steps do not. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Cost:
    """Of one side's run: seconds of wall and CPU time, and the largest process's peak resident bytes."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0

    def run(self, *command: str | Path) -> None:
        """Run a command and add what it cost."""
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        if status:
            raise SystemExit(f"{command[0]}: status {status}")
        self.wall_s += time.perf_counter() - start
        self.cpu_s += usage.ru_utime + usage.ru_stime
        unit = 1 if sys.platform == "darwin" else 1024
        self.peak_bytes = max(self.peak_bytes, usage.ru_maxrss * unit)


def ours(checkpoint: Path, work: Path, quant: str) -> Cost:
    """One command."""
    cost = Cost()
    cost.run(
        sys.executable, "-m", "pocketllava.cli", "convert", checkpoint, "--out", work / "bundle",
        "--quant", quant, "--quiet",
    )  # fmt: skip
    shutil.rmtree(work / "bundle")
    return cost


def theirs(checkpoint: Path, work: Path, quant: str, converter: Path, quantizer: Path) -> Cost:
    """F16 file, then llama-quantize."""
    cost = Cost()
    half, final = work / "f16.gguf", work / "final.gguf"
    cost.run(sys.executable, converter, checkpoint, "--outtype", "f16", "--outfile", half)
    cost.run(quantizer, half, final, quant, str(os.cpu_count()))
    half.unlink()
    final.unlink()
    return cost


def main() -> None:
    """Alternate the two sides and print the table."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("checkpoint", type=Path)
    ap.add_argument("--llama-cpp", type=Path, required=True)
    ap.add_argument("--llama-quantize", type=Path, required=True)
    ap.add_argument("--quant", default="Q4_K_M")
    ap.add_argument("--runs", type=int, default=5)
    a = ap.parse_args()
    costs: dict[str, list[Cost]] = {"pocketllava": [], "llama.cpp": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(a.runs):
            costs["pocketllava"].append(ours(a.checkpoint, Path(folder), a.quant))
            converter = a.llama_cpp / "convert_hf_to_gguf.py"
            costs["llama.cpp"].append(
                theirs(a.checkpoint, Path(folder), a.quant, converter, a.llama_quantize)
            )
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("pocketllava", "llama-cpp-python"))
    print(f"{a.checkpoint.name}, {a.quant}, {os.cpu_count()} cores ({platform.machine()}), {versions}")
    print(f"\n| median of {a.runs} | wall s | CPU s | peak resident MB |\n|---|---|---|---|")
    medians = {}
    for name, runs in costs.items():
        medians[name] = [
            statistics.median(getattr(c, f) for c in runs) for f in ("wall_s", "cpu_s", "peak_bytes")
        ]
        wall, cpu, peak = medians[name]
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {peak / 1e6:.0f} |")
    ratios = [x / y for x, y in zip(medians["pocketllava"], medians["llama.cpp"], strict=True)]
    print("| ratio | " + " | ".join(f"{r:.2f}" for r in ratios) + " |")


if __name__ == "__main__":
    main()

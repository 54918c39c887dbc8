"""Planned against measured peak memory: load, one picture, an answer of 32 tokens, each in a process of its own.

    python benchmarks/planned_memory.py FOLDER... [--ctx 2048,4096] [--kv f16,q8_0] [--weights mapped,memory]

FOLDER is a bundle of any size, "demo", or what else a command takes for a model. Measured is the peak of the resident
set (VmHWM; ru_maxrss elsewhere), which counts everything that the process touched: Python, libraries, mapped weights.
Prints one table; exits 1 where planned and measured differ by more than 10 %. What cannot be loaded has its
reason in the place of the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

ALLOWED = 0.10
MB = 1e6


def main() -> int:
    """Every combination of the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+")
    for name, default in (("ctx", "2048,4096"), ("kv", "f16,q8_0"), ("weights", "mapped,memory")):
        parser.add_argument(f"--{name}", default=default)
    options = parser.parse_args()
    worst = 0.0
    print(
        f"{'bundle':<24} {'ctx':>5} {'KV':<5} {'weights':<7} {'planned MB':>10} {'measured MB':>11} {'off by':>7}"
    )
    lists = (options.ctx.split(","), options.kv.split(","), options.weights.split(","))
    for folder, ctx, kv, weights in itertools.product(options.folders, *lists):
        row = f"{Path(folder).name:<24} {ctx:>5} {kv:<5} {weights:<7}"
        planned, peak, reason = measured(folder, int(ctx), kv, weights)
        if reason:
            print(f"{row} {reason}", flush=True)
            continue
        off = planned / peak - 1
        worst = max(worst, abs(off))
        print(f"{row} {planned / MB:>10.1f} {peak / MB:>11.1f} {off:>+7.1%}", flush=True)
    print(f"largest difference: {worst:.1%}")
    return int(worst > ALLOWED)


def measured(folder: str, ctx: int, kv: str, weights: str) -> tuple[int, int, str]:
    """(planned, peak) bytes of a child that loads the bundle and answers once; else why it did not."""
    command = [sys.executable, "-I", __file__, "--child", folder, str(ctx), kv, weights]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        *_, last = done.stderr.splitlines() or [""]
        return 0, 0, f"ended with {done.returncode}: {last}"
    values = json.loads(done.stdout.splitlines()[-1])
    return values["planned"], values["peak"], values["reason"]


def child(folder: str, ctx: str, kv: str, weights: str) -> None:
    """One process: plan, load, answer, and the peak."""
    import numpy as np

    from pocketllava import Llava, PocketLlavaError

    load = {"n_ctx": int(ctx), "kv_type": kv, "weights": weights}
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    try:
        planned = Llava.plan(folder, **load).total
        with Llava.load(folder, **load) as llava:
            llava.ask(picture, "Describe the picture.", max_tokens=32)
    except PocketLlavaError as error:
        print(json.dumps({"planned": 0, "peak": 0, "reason": str(error)}))
        return
    print(json.dumps({"planned": planned, "peak": peak_bytes(), "reason": ""}))


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text("ascii").splitlines() if row.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main())

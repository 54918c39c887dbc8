"""Start-up times: `import pocketllava`, its class Llava, and `pocketllava --help`, medians of N fresh processes.

python benchmarks/startup.py [N]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

IMPORTS = ("import pocketllava", "from pocketllava import Llava")
TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def timed(*command: str) -> tuple[float, str]:
    """(wall seconds, stdout)."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def main(n: int) -> None:
    """Print the medians."""
    for statement in IMPORTS:
        times = [float(timed(sys.executable, "-c", TIMED.format(statement))[1]) for _ in range(n)]
        print(f"{statement}: {statistics.median(times):.3f} s")
    helps = [timed(sys.executable, "-m", "pocketllava.cli", "--help")[0] for _ in range(n)]
    print(f"pocketllava --help: {statistics.median(helps):.3f} s, whole process")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)

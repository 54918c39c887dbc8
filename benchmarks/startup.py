"""Start-up times: `import pocketllava` and `pocketllava --help`, medians of N fresh processes.

python benchmarks/startup.py [N]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

IMPORT = "import time; start = time.perf_counter(); import pocketllava; print(time.perf_counter() - start)"


def timed(*command: str) -> tuple[float, str]:
    """(wall seconds, stdout)."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def main(n: int) -> None:
    """Print both medians."""
    imports = [float(timed(sys.executable, "-c", IMPORT)[1]) for _ in range(n)]
    helps = [timed(sys.executable, "-m", "pocketllava.cli", "--help")[0] for _ in range(n)]
    print(f"import pocketllava: {statistics.median(imports):.3f} s")
    print(f"pocketllava --help: {statistics.median(helps):.3f} s, whole process")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)

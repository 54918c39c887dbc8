"""Endurance: a day's work of the demo model at once; memory and descriptors stay flat, answers those of a fresh model.

    python benchmarks/soak.py [--only PART ...] [--images N] [--conversations N] [--loads N] [--restarts N]
        [--served N] [--checks N] [--results FILE] [--again]

images: different pictures, in every form that a user has. conversations: with edits, answers cancelled at any step,
and a bounded cache folder. loads: models loaded, asked and closed. restarts: engines that are killed in their child.
served: the same below `pocketllava serve`. Each part is a process of its own, and its row of the table is kept in
FILE: what was interrupted goes on with the part it was in; --again repeats. Growth counts from the part's first
eighth on, or once the caches are full. Exits with 1 where something grew or an answer differed.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from arguments import about
from soak_work import PARTS, Check, fresh

USUAL = {"images": 10_000, "conversations": 2_000, "loads": 200, "restarts": 500, "served": 250}
EIGHTHS = 8
# Steps that fill the caches in memory (feature_cache.MAX_COUNT). Conversations hold states and pictures of many sizes:
# malloc has seen its largest mix after 750 of them.
FILLED = {"images": 600, "conversations": 1000}
MAX_GROWTH_MB = 20.0
RESULTS = Path("build/soak.json")
HEAD = (
    "| part | n | s | MB, warm | MB, most | growth | MB by eighths | files | threads | children"
    " | answers of a fresh model |"
)


@dataclass(frozen=True)
class Sizes:
    """Of a process."""

    megabytes: float
    files: int
    threads: int
    children: int

    @classmethod
    def of(cls, process: psutil.Process) -> Sizes:
        """As it is now."""
        files = process.num_handles() if sys.platform == "win32" else process.num_fds()
        return cls(
            process.memory_info().rss / 1e6,
            files,
            process.num_threads(),
            len(process.children(recursive=True)),
        )

    def most(self, other: Sizes) -> Sizes:
        """The larger of each."""
        return Sizes(*map(max, asdict(self).values(), asdict(other).values()))


@dataclass(frozen=True)
class Row:
    """One part's result. equal, checked: answers that a fresh model gives too, of those that were compared; ties: that
    differ by rounding. course: megabytes at each eighth.
    """

    part: str
    n: int
    seconds: float
    warm: Sizes
    most: Sizes
    equal: int
    ties: int
    checked: int
    course: tuple[float, ...]

    @property
    def growth(self) -> float:
        """Megabytes, from the warm-up's end to the largest since."""
        return self.most.megabytes - self.warm.megabytes

    @property
    def flat(self) -> bool:
        """Whether it passes. A process that is being started may be there in either sample."""
        slack = {"files": 2, "threads": 1, "children": 1}
        steady = all(getattr(self.most, k) <= getattr(self.warm, k) + n for k, n in slack.items())
        return self.growth < MAX_GROWTH_MB and steady and self.equal + self.ties == self.checked

    def __str__(self) -> str:
        counts = " | ".join(
            f"{getattr(self.warm, name)}, {getattr(self.most, name)}"
            for name in ("files", "threads", "children")
        )
        return (
            f"| {self.part} | {self.n} | {self.seconds:.0f} | {self.warm.megabytes:.1f} | {self.most.megabytes:.1f}"
            f" | {self.growth:+.1f} | {' '.join(f'{mb:.0f}' for mb in self.course)} | {counts} | {self.equal} of"
            f" {self.checked}{f', {self.ties} tied' if self.ties else ''} |"
        )


def run(part: str, n: int, n_checks: int) -> Row:
    """A part in this process: its work, its sizes, then a fresh model for some of its answers."""
    warm_up = max(n // EIGHTHS, min(FILLED.get(part, 1), n // 2))
    start, warm, most, checks, course = time.monotonic(), None, None, [], []
    for k, check in enumerate(PARTS[part](n)):
        if k % max(1, n // n_checks) == 0:
            checks.append(check)
        if (k + 1) % (n / EIGHTHS) < 1:
            course.append(Sizes.of(_watched(part)).megabytes)
        if k >= warm_up and (k - warm_up) % 5 == 0:
            sizes = Sizes.of(_watched(part))
            warm = warm or sizes
            most = sizes.most(most or sizes)
    assert warm
    assert most
    seconds = time.monotonic() - start
    gc.collect()
    return Row(part, n, seconds, warm, most, *_compared(checks[:n_checks], part), tuple(course))


def _watched(part: str) -> psutil.Process:
    """This process, or the server that is its child."""
    own = psutil.Process()
    return own.children()[0] if part == "served" else own


def _compared(checks: list[Check], part: str) -> tuple[int, int, int]:
    results = [fresh(check) for check in checks]
    for check, result in zip(checks, results, strict=True):
        if result != "equal":
            print(f"{part}: a fresh model answers otherwise, {result}: {check}", file=sys.stderr)
    return results.count("equal"), results.count("tie"), len(checks)


def _row(stored: dict[str, object]) -> Row:
    sizes = {name: Sizes(**stored[name]) for name in ("warm", "most")}  # type: ignore[arg-type]
    return Row(**{**stored, **sizes})  # type: ignore[arg-type]


def _kept(path: Path) -> dict[str, Row]:
    return (
        {name: _row(row) for name, row in json.loads(path.read_text("utf-8")).items()}
        if path.is_file()
        else {}
    )


def _keep(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {**_kept(path), row.part: row}
    path.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1), "utf-8")


def main() -> None:
    """Run the parts that have no result yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append")
    for part, n in USUAL.items():
        parser.add_argument(f"--{part}", type=int, default=n)
    parser.add_argument("--checks", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # the part's own process
    a = parser.parse_args()
    parts = a.only or list(PARTS)
    if a.here:
        _keep(a.results, run(parts[0], getattr(a, parts[0]), a.checks))
        return
    for part in parts:
        before = _kept(a.results).get(part)
        if a.again or before is None or before.n != getattr(a, part):
            _in_child(part, getattr(a, part), a)
    rows = _kept(a.results)
    print(about(), "", HEAD, "|---" * HEAD.count(" | ") + "|---|", *map(str, rows.values()), sep="\n")
    raise SystemExit(0 if all(row.flat for row in rows.values()) else 1)


def _in_child(part: str, n: int, a: argparse.Namespace) -> None:
    options = ["--only", part, f"--{part}", str(n), "--checks", str(a.checks), "--results", str(a.results)]
    subprocess.run([sys.executable, __file__, *options, "--here"], check=True)


if __name__ == "__main__":
    main()

"""`pocketllava caption` on thousands of drawn pictures: equality with ask, kills, memory, shards, a full disk, search.

    python benchmarks/captions.py build/captions -n 10000            # all of it
    python benchmarks/captions.py build/captions -n 2000 --only kills shards

Each check prints one line of JSON. A folder that has its pictures is used again.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil

from pocketllava import Answer, Llava
from pocketllava.album import alike
from pocketllava.album.captioner import Plan, run
from pocketllava.album.journal import Album
from pocketllava.album.prompts import DEFAULT_PROMPT, questions
from pocketllava.album.search import found
from pocketllava.album.walk import Walk
from pocketllava.models.demo import scenes
from pocketllava.models.demo.world import PLACES
from pocketllava.names import open_bundle
from pocketllava.types import Options

FIRST = scenes.HELD_OUT_SEEDS.start
FORMATS = ("png", "jpg", "webp", "bmp", "tiff", "gif")
DAMAGED = 20  # every 20th
CONTENT = """SELECT p.path, p.size, p.mtime_ns, p.sha256, q.identity, a.sha256, a.text, a.record, a.tokens,
    a.finish_reason, a.mark, a.error, a.pixels FROM pictures p
    JOIN answers a ON a.picture = p.id JOIN questions q ON q.id = a.question
    ORDER BY p.path, q.identity"""


def draw(folder: Path, n: int) -> None:
    """n pictures in folders of 1,000; one in 20 is damaged."""
    for k in range(n):
        path = folder / f"{k // 1000:02d}" / f"{k:06d}.{FORMATS[k % len(FORMATS)]}"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        scenes.scene(FIRST + k).draw().save(path, quality=92)
        if k % DAMAGED == DAMAGED - 1:
            data = path.read_bytes()
            path.write_bytes((b"", data[:20], b"not a picture", data[: len(data) // 3])[k // DAMAGED % 4])


def command(folder: Path, album: Path, *more: str) -> list[str]:
    """The command line that captions it all."""
    return [
        sys.executable,
        "-m",
        "pocketllava",
        "caption",
        "demo",
        str(folder),
        "-r",
        "-q",
        "--album",
        str(album),
        *more,
    ]


def content(album: Path) -> list[tuple[object, ...]]:
    """All that an album holds, but for ids and seconds."""
    with sqlite3.connect(album) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return database.execute(CONTENT).fetchall()


def whole(folder: Path, work: Path) -> dict[str, object]:
    """One run, in this process, its memory and descriptors watched."""
    walk, options, process = Walk((str(folder),), True), Options(), psutil.Process()
    path = fresh(work / "whole.album")
    asked = questions(open_bundle("demo"), [DEFAULT_PROMPT], options, {})
    start, rss, files, n_failed = time.monotonic(), list[int](), list[int](), 0
    with Llava.load("demo", n_threads=1) as llava, Album(path, root=walk.root) as album:
        for n, event in enumerate(run(llava, album, Plan(walk, asked, options))):
            n_failed += event.failed
            if n >= 500 and n % 100 == 0:
                rss.append(process.memory_info().rss)
                files.append(process.num_fds() if hasattr(process, "num_fds") else process.num_handles())
    return {
        "pictures": n + 1, "failed": n_failed, "seconds": round(time.monotonic() - start, 1),
        "MB after 500": rss[0] // 10**6, "MB grown": (max(rss) - rss[0]) / 1e6, "descriptors": sorted(set(files)),
    }  # fmt: skip


def many(batch: int | str) -> dict[str, object]:
    """2,000 different pictures through ask_many, its memory watched after the first 500."""
    process, rss = psutil.Process(), list[int]()
    pictures = (scenes.scene(FIRST + k).draw() for k in range(2000))
    with Llava.load("demo", n_threads=1) as llava:
        answers = llava.ask_many(pictures, DEFAULT_PROMPT, batch=batch)  # type: ignore[arg-type]
        for n, answer in enumerate(answers):
            assert isinstance(answer, Answer)
            if n >= 500 and n % 50 == 0:
                rss.append(process.memory_info().rss)
    return {"pictures": n + 1, "batch": batch, "MB after 500": rss[0] // 10**6,
            "MB grown": (max(rss) - rss[0]) / 1e6}  # fmt: skip


def full_disk(folder: Path, work: Path, limit: int) -> dict[str, object]:
    """A run whose files may have `limit` bytes, as if the disk were full there; then one that goes on."""
    import resource

    path = fresh(work / "full.album")
    arguments = command(folder / "00", path, "--limit", "500")
    done = subprocess.run(
        arguments, stderr=subprocess.PIPE, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    before = content(path)
    again = subprocess.run(arguments, stderr=subprocess.DEVNULL, check=False).returncode
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("warning:", "500 pictures"))]
    return {"exit code": done.returncode, "lines": lines[1:], "answers": len(before), "then": again,
            "kept": before == [row for row in content(path) if row[0] in {row[0] for row in before}]}  # fmt: skip


def equal(work: Path, n: int) -> dict[str, object]:
    """n captions of the whole run against Llava.ask."""
    with Llava.load("demo", n_threads=1) as llava, Album(work / "whole.album") as album:
        rows = [row for row in album.rows() if row.given.error is None]
        chosen = random.Random(1).sample(rows, min(n, len(rows)))
        unequal = sum(llava.ask(row.file, DEFAULT_PROMPT).text != row.given.text for row in chosen)
    return {"compared": len(chosen), "unequal": unequal}


def kills(folder: Path, work: Path, times: int, reference: Path) -> dict[str, object]:
    """Killed at random moments, then run to its end: the same album as an undisturbed run's."""
    path, rng, killed, done = fresh(work / "killed.album"), random.Random(2), 0, list[int]()
    for _ in range(times):
        child = subprocess.Popen(command(folder, path), stderr=subprocess.DEVNULL)
        try:
            child.wait(rng.uniform(0.2, 6))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
            killed += 1
        child.wait()
        done.append(len(content(path)) if path.exists() and path.stat().st_size else 0)
    rc = subprocess.run(command(folder, path), stderr=subprocess.DEVNULL, check=False).returncode
    lost = sum(later < earlier for earlier, later in pairwise(done))
    return {"kills": killed, "answers at each": done[::5], "lost": lost, "exit code": rc,
            "equal": content(path) == content(reference)}  # fmt: skip


def shards(folder: Path, work: Path, reference: Path) -> dict[str, object]:
    """Four parts, merged."""
    parts = [fresh(work / f"part{k}.album") for k in (1, 2, 3, 4)]
    for k, part in enumerate(parts, 1):
        subprocess.run(command(folder, part, "--shard", f"{k}/4"), stderr=subprocess.DEVNULL, check=False)
    merged = fresh(work / "merged.album")
    merge = [sys.executable, "-m", "pocketllava", "album", "merge", str(merged), *map(str, parts)]
    subprocess.run(merge, stderr=subprocess.DEVNULL, check=True)
    sizes = [len(content(part)) for part in parts]
    return {"parts": sizes, "equal": content(merged) == content(reference)}


def undisturbed(folder: Path, work: Path) -> Path:
    """An album that was made in one go, for kills and shards to be compared with: that of `whole`, if it was run."""
    if (work / "whole.album").exists():
        return work / "whole.album"
    path = fresh(work / "undisturbed.album")
    subprocess.run(command(folder, path), stderr=subprocess.DEVNULL, check=False)
    return path


def search(work: Path) -> list[dict[str, object]]:
    """1,000 questions of the form "green square at the left", answered by `find`."""
    rng = random.Random(3)
    with Album(work / "whole.album") as album:
        shown = {row.path: scenes.scene(FIRST + int(Path(row.path).stem)) for row in album.rows()
                 if row.given.error is None}  # fmt: skip
        asked = []
        while len(asked) < 1000:
            thing = rng.choice(rng.choice(list(shown.values())).things)
            right = {
                path
                for path, s in shown.items()
                if any((t.name, t.place) == (thing.name, thing.place) for t in s.things)
            }
            asked.append((thing.name, thing.place, right))
        words = {
            "words": lambda name, place: f"{name} at the {place}",
            "phrase": lambda name, place: f'"{name} at the {place}"',
            "phrase, longer places left out": lambda name, place: " NOT ".join(
                [
                    f'"{name} at the {place}"',
                    *(f'"{name} at the {p}"' for p in PLACES if p.startswith(place + " ")),
                ]
            ),
        }
        return [{"query": way, **figures(album, asked, query)} for way, query in words.items()]


def figures(album: Album, asked: list[tuple[str, str, set[str]]], query: object) -> dict[str, object]:
    """Precision and recall over all questions, and the time of one."""
    right = shown = wanted = 0
    start = time.monotonic()
    for name, place, expected in asked:
        hits = {row.path for row in found(album, query(name, place), limit=10**6)}  # type: ignore[operator]
        right, shown, wanted = right + len(hits & expected), shown + len(hits), wanted + len(expected)
    return {"precision": round(right / max(1, shown), 4), "recall": round(right / wanted, 4),
            "ms": round((time.monotonic() - start) / len(asked) * 1000, 2)}  # fmt: skip


def listing(work: Path, n: int) -> dict[str, object]:
    """The first of n paths, all of them, and the memory for it, in a process of its own."""
    folder = work / "links"
    target = work / "one.png"
    scenes.scene(FIRST).draw().save(target)
    if not folder.exists():
        for k in range(n):
            if k % 100_000 == 0:
                (folder / str(k // 100_000)).mkdir(parents=True)
            (folder / str(k // 100_000) / f"{k:07d}.png").symlink_to(target)
    code = """
import sys, time
from pocketllava.album.walk import Walk, Count
start = time.monotonic()
walk = Walk((sys.argv[1],), True)
count = Count(walk)
files = walk.files()
next(files)
first = time.monotonic() - start
n = 1 + sum(1 for _ in files)
count.wait(60)
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1000
print(n, count.found, round(first, 2), round(time.monotonic() - start, 2), round(peak, 1))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    n_found, counted, first_s, all_s, peak = done.stdout.split()
    return {
        "paths": n_found,
        "counted": counted,
        "first after s": first_s,
        "all after s": all_s,
        "peak MB": peak,
    }


def likeness(work: Path, n: int, n_embd: int) -> dict[str, object]:
    """The nearest of n pictures' features; the second time, with the file in memory."""
    with Album(fresh(work / "features.album"), root=str(work)) as album:
        rng = np.random.default_rng(4)
        album.database.execute("BEGIN")
        for k in range(n):
            alike.put(album, f"{k:064d}", "tower", rng.standard_normal((1, n_embd), np.float32))
        album.database.execute("COMMIT")
        wanted = alike.get(album, f"{7:064d}", "tower")
        assert wanted is not None
        times = []
        for _ in range(3):
            start = time.monotonic()
            assert alike.nearest(album, "tower", wanted, 20)[0][0] == f"{7:064d}"
            times.append(round(time.monotonic() - start, 3))
    return {"pictures": n, "features": n_embd, "seconds": times}


def fresh(path: Path) -> Path:
    """The path, with nothing there."""
    for old in path.parent.glob(path.name + "*"):
        old.unlink()
    return path


def checks(folder: Path, work: Path, names: list[str], kill: int) -> Iterator[tuple[str, object]]:
    """Those that are asked for."""
    reference = undisturbed(folder, work) if {"kills", "shards"} & set(names) else work
    for name in names:
        if name == "whole":
            yield name, whole(folder, work)
        elif name == "many":
            yield from ((name, many(batch)) for batch in (1, "auto"))
        elif name == "full":
            yield name, full_disk(folder, work, 200_000)
        elif name == "equal":
            yield name, equal(work, 10**6)
        elif name == "kills":
            yield name, kills(folder, work, kill, reference)
        elif name == "shards":
            yield name, shards(folder, work, reference)
        elif name == "search":
            yield from (("search", line) for line in search(work))
        elif name == "listing":
            yield name, listing(work, 1_000_000)
        elif name == "likeness":
            yield from ((name, likeness(work, 100_000, n_embd)) for n_embd in (256, 4096))


ALL = ("whole", "equal", "many", "kills", "shards", "full", "search", "listing", "likeness")


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("-n", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    arguments = parser.parse_args()
    pictures = arguments.folder / f"pictures-{arguments.n}"
    work = arguments.folder / f"work-{arguments.n}"
    work.mkdir(parents=True, exist_ok=True)
    draw(pictures, arguments.n)
    for name, result in checks(pictures, work, arguments.only, arguments.kills):
        print(json.dumps({"check": name, "result": result}), flush=True)


if __name__ == "__main__":
    main()

"""pocketllava beside llama-cpp-python's stock handler and llama-server, on the same files in one run.

    LLAMA_SERVER=build/bin/llama-server python benchmarks/against_peers.py BUNDLE [--image FILE] [-n 3] [--tokens 64]
        [--image-tokens 128] [--ctx 2048] [--short] [--sides 'pocketllava|llama-server']

Each side runs in a process of its own (this script with --side), one at a time, started anew for every round, the
sides in turn, with pictures that it has not seen. Files are in the page cache. Everybody answers one question about
another picture first; llama-server also warms up when it starts, as is its default, and keeps its own defaults but
for the context, the threads and one slot. A first token is wall time from the request to the first generated token,
decoding the tokens after it by the wall time that they took, peak memory that of the process that holds the model
(only on Linux for llama-server; elsewhere what it holds at its end). Run it alone: ggml's threads wait by spinning.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from arguments import about, arguments
from sides import CONTEXT, FEWER, MEASURES, OURS, PICTURES, SERVER, STOCK, THEIRS, Asked, Found, seen_side

from pocketllava.measure.speed import jpeg, unseen
from pocketllava.models import Bundle
from pocketllava.names import open_bundle
from pocketllava.vision.image import load

SEEN, KEPT = "cache_dir", "keep_prefixes"  # more processes of ours
ROWS = (
    ("prompt", "prompt of the first question, tokens"),
    ("cold", "first token, new image, s"),
    ("second", "first token, second question, s"),
    ("turns", "first token, turns 2 to 5 of a conversation with answers of 24 tokens, mean, s"),
    ("preparing", "preparing an image, s"),
    ("prepared", "first token, prepared image, s"),
    ("back", "first token, back to the first of two images, s"),
    ("decoding", "decoding, tokens/s"),
    ("seen_encode", "image seen before, new process with cache_dir: encoding, s"),
    ("seen", "image seen before, new process with cache_dir: first token, s"),
    ("kept", "the same with keep_prefixes: first token, s"),
    ("peak", "peak resident memory, GB"),
)
GOALS = (  # ours, the peer's, peer, bound, whether less is better
    ("second", "second", STOCK, 1 / 20, True),
    ("second", "second", THEIRS, 1.0, True),
    ("prepared", "second", STOCK, 1 / 20, True),
    ("prepared", "second", THEIRS, 1.0, True),
    ("turns", "turns", THEIRS, 1.0, True),
    ("cold", "cold", THEIRS, 1.0, True),
    ("decoding", "decoding", THEIRS, 1.0, False),
    ("decoding", "decoding", STOCK, 1.0, False),
)
FEWER_GOAL = 0.35  # of llama-server's first token on a new image


def one_side(a: argparse.Namespace) -> Found:
    """In a child process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that llama-server is ended, too
    bundle = open_bundle(a.bundle)
    pictures = {name: (Path(a.work) / f"{name}.jpg").read_bytes() for name in (*PICTURES, "seen")}
    if a.side in (SEEN, KEPT):
        return seen_side(bundle, pictures["seen"], str(Path(a.work) / "cache"), a.side == KEPT)
    few = a.image_tokens if a.side == FEWER else None
    return MEASURES[a.side](bundle, pictures, Asked(a.tokens, a.ctx, few, a.short))


def run_side(a: argparse.Namespace, side: str, work: str) -> Found:
    """Start a child process and read the line that it prints."""
    command = [sys.executable, __file__, a.bundle, "--side", side, "--tokens", str(a.tokens), "--work", work]
    command += ["--image-tokens", str(a.image_tokens), "--ctx", str(a.ctx), *(["--short"] if a.short else [])]
    done = subprocess.run(command, capture_output=True, check=False)  # libmtmd talks on stderr
    if done.returncode:
        said = done.stderr[-3000:].decode("utf-8", "replace")
        raise SystemExit(f"{said}\n{side}: exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def in_turn(a: argparse.Namespace, sides: list[str]) -> dict[str, list[Found]]:
    """Every side in a process of its own, round after round, each time with new pictures."""
    found: dict[str, list[Found]] = {side: [] for side in sides}
    picture, bundle = load(a.image), open_bundle(a.bundle)
    with tempfile.TemporaryDirectory() as work:
        for n in range(a.runs):
            for name in PICTURES if n else (*PICTURES, "seen"):
                (Path(work) / f"{name}.jpg").write_bytes(jpeg(unseen(picture)))
            read(bundle.model, bundle.mmproj)
            for side in sides[n % len(sides) :] + sides[: n % len(sides)]:
                values = run_side(a, side, work)
                if side == OURS and not a.short:
                    if not n:
                        run_side(a, KEPT, work)  # fills the cache folder
                    values |= run_side(a, SEEN, work) | run_side(a, KEPT, work)
                found[side].append(values)
                print(f"round {n + 1} of {a.runs}, {side}: {values}", file=sys.stderr, flush=True)
    return found


def read(*files: Path) -> None:
    """Into the page cache."""
    for file in files:
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def figure(value: float) -> str:
    """Three digits, all of them where there are more before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def table(medians: dict[str, dict[str, float]]) -> list[str]:
    """All medians as markdown."""
    lines = [f"| | {' | '.join(medians)} |", "|---" * (len(medians) + 1) + "|"]
    for row, name in ROWS:
        cells = (figure(side[row]) if row in side else "-" for side in medians.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def goals(medians: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The ratios that are aimed at."""
    found = []
    for row, other, peer, bound, less in GOALS:
        ours, theirs = medians[OURS].get(row), medians.get(peer, {}).get(other)
        if ours is not None and theirs:
            ratio, name = ours / theirs, dict(ROWS)[row].rpartition(",")[0]
            name += f" / {peer}'s" + (" second question" if other != row else "")
            met, goal = (ratio <= bound, f"<= {bound}") if less else (ratio >= bound, f">= {bound}")
            found.append({"ratio": name, "found": ratio, "goal": goal, "met": met})
    few, theirs = medians.get(FEWER, {}).get("cold"), medians.get(THEIRS, {}).get("cold")
    if few and theirs:
        ratio = few / theirs
        name, goal = f"first token, new image, {FEWER} / {THEIRS}'s", f"<= {FEWER_GOAL}"
        found.append({"ratio": name, "found": ratio, "goal": goal, "met": ratio <= FEWER_GOAL})
    return found


def facts(bundle: Bundle, a: argparse.Namespace, sides: list[str]) -> dict[str, Any]:
    """Versions, files and command."""
    types = bundle.manifest.types
    found = {"files": f"{bundle.manifest.source.id}, {types.model} + {types.mmproj}"}
    if THEIRS in sides:
        done = subprocess.run([os.environ[SERVER], "--version"], capture_output=True, text=True, check=False)
        told = (done.stdout + done.stderr).splitlines()
        found["llama-server"] = next(
            (x.partition(": ")[2] for x in told if x.startswith("version")), "unknown"
        )
    command = shlex.join(["python", "benchmarks/against_peers.py", *sys.argv[1:]])
    if FEWER in sides:
        found[FEWER] = a.image_tokens
    return {**found, "n_ctx": a.ctx, "rounds": a.runs, "command": command}


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--ctx", type=int, default=CONTEXT)
    parser.add_argument("--image-tokens", type=int, default=128, help=f"of the side {FEWER!r}")
    parser.add_argument("--short", action="store_true", help="A new image's first token and decoding only.")
    parser.add_argument("--sides", help="Separated by |; all unless given.")
    parser.add_argument("--out", type=Path, help="Write every value to this JSON file.")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.side:
        print(json.dumps(one_side(a)))
        return
    sides = [OURS, FEWER, STOCK, *([THEIRS] if os.environ.get(SERVER) else [])]
    sides = [side for side in sides if not a.sides or side in a.sides.split("|")]
    told = facts(open_bundle(a.bundle), a, sides)
    rounds = in_turn(a, sides)
    medians = {
        side: {
            row: statistics.median(r[row] for r in found) for row, _ in ROWS if all(row in r for r in found)
        }
        for side, found in rounds.items()
    }
    reached = goals(medians)
    print(about(**told) + "\n")
    print("\n".join([*table(medians), "", "| ratio of medians | | goal | met |", "|---|---|---|---|"]))
    for g in reached:
        print(f"| {g['ratio']} | {g['found']:.3f} | {g['goal']} | {'yes' if g['met'] else 'no'} |")
    if a.out:
        result = {"about": about(**told), "medians": medians, "goals": reached, "rounds": rounds}
        a.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()

"""From the command to the answer: `pocketllava ask` beside llama-mtmd-cli and llama_cpp's stock handler.

    LLAMA_MTMD=build/bin/llama-mtmd-cli python benchmarks/whole_process.py BUNDLE [--image FILE] [-n 3] [--tokens 1]

One question about one picture, greedy, in a new process each time, the sides in turn, medians of seconds. Cold: after
the files were dropped from the page cache (posix_fadvise, Linux); warm: with all of them in it. All with as many
threads as there are cores, and the same context. Run it alone.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from against_peers import read
from arguments import about, arguments
from sides import CONTEXT

from pocketllava.llamacpp.devices import cores
from pocketllava.measure.speed import FIRST
from pocketllava.models import Bundle
from pocketllava.names import open_bundle

OURS, FEWER, STOCK, PEER = "pocketllava", "pocketllava, 128 image tokens", "stock handler", "llama-mtmd-cli"
MTMD = "LLAMA_MTMD"
STOCK_PROGRAM = """
import sys
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Llava15ChatHandler
model, mmproj, image, question, tokens, threads, n_ctx = sys.argv[1:]
handler = Llava15ChatHandler(clip_model_path=mmproj, verbose=False)
llama = Llama(model, chat_handler=handler, n_ctx=int(n_ctx), n_threads=int(threads), n_threads_batch=int(threads),
              verbose=False)
import base64
url = "data:image/jpeg;base64," + base64.b64encode(open(image, "rb").read()).decode()
parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
llama.create_chat_completion([{"role": "user", "content": parts}], max_tokens=int(tokens), temperature=0.0)
"""


def commands(bundle: Bundle, image: str, tokens: int) -> dict[str, list[str]]:
    """What each side is started with."""
    threads, model, mmproj = str(cores()), str(bundle.model), str(bundle.mmproj)
    ours = [sys.executable, "-m", "pocketllava", "ask", str(bundle.folder), image, FIRST, "-n", str(tokens)]
    ours += ["--ctx", str(CONTEXT), "--quiet"]
    stock = [
        sys.executable,
        "-c",
        STOCK_PROGRAM,
        model,
        mmproj,
        image,
        FIRST,
        str(tokens),
        threads,
        str(CONTEXT),
    ]
    found = {OURS: ours, FEWER: [*ours, "--image-tokens", "128"], STOCK: stock}
    if peer := os.environ.get(MTMD):
        found[PEER] = [
            peer, "-m", model, "--mmproj", mmproj, "--image", image, "-p", FIRST, "-n", str(tokens), "-t", threads,
            "-tb", threads, "-c", str(CONTEXT), "--temp", "0", "--offline", "--jinja",
        ]  # fmt: skip
    return found


def seconds(command: list[str]) -> float:
    """Wall time of a process that succeeds."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    wall_s = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}: {done.stderr[-2000:].decode('utf-8', 'replace')}")
    return wall_s


def forget(*files: Path) -> None:
    """Drop files from the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=1)
    a = parser.parse_args()
    bundle = open_bundle(a.bundle)
    files = (bundle.model, bundle.mmproj)
    sides = commands(bundle, a.image, a.tokens)
    found: dict[str, dict[str, list[float]]] = {}
    for n in range(a.runs):
        for state, prepare in (("warm", read), ("cold", forget)):
            order = list(sides)[n % len(sides) :] + list(sides)[: n % len(sides)]
            for side in order:
                prepare(*files)
                wall_s = seconds(sides[side])
                found.setdefault(state, {}).setdefault(side, []).append(wall_s)
                print(json.dumps({"round": n + 1, "cache": state, side: wall_s}), file=sys.stderr, flush=True)
    print(about(tokens=a.tokens, rounds=a.runs) + "\n")
    print(f"| page cache | {' | '.join(sides)} |\n|---{'|---' * len(sides)}|")
    for state, times in found.items():
        medians = {side: statistics.median(values) for side, values in times.items()}
        print(f"| {state}, s | " + " | ".join(f"{medians[side]:.2f}" for side in sides) + " |")
        best = min(value for side, value in medians.items() if side not in (OURS, FEWER))
        ratios = (f"{medians[side] / best:.3f}" for side in sides)
        print(f"| {state}, to the better peer | " + " | ".join(ratios) + " |")


if __name__ == "__main__":
    main()

"""pocketllava beside llama-cpp-python's stock handler and llama-server, on the same files in one run.

    LLAMA_SERVER=build/bin/llama-server python benchmarks/against_peers.py BUNDLE [-n 3] [--tokens 64]

Each side runs in a process of its own, one at a time, started anew for every round, the sides in turn. Both files
are read once before, so that nobody pays for a cold disk. Every figure is wall time from asking to the first
generated token, as the side's user sees it. Run it alone: llama.cpp's threads wait by spinning.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pocketllava import Llava, Options
from pocketllava.backend import cores
from pocketllava.bench import FIRST, SECOND, peak_bytes, unseen
from pocketllava.models import Bundle

CONTEXT = 2048
SIDES = ("pocketllava", "stock handler", "llama-server")
ROWS = (
    ("cold", "first token, new image, s"),
    ("second", "first token, second question, s"),
    ("prepared", "first token, prepared image, s"),
    ("back", "first token, back to the first of two images, s"),
    ("decoding", "decoding, tokens/s"),
    ("seen_encode", "image seen before, new process: encoding, s"),
    ("seen", "image seen before, new process: first token, s"),
    ("kept", "the same with --keep-prefixes, s"),
    ("peak", "peak resident memory, GB"),
)
GOALS = (  # row, peer, bound, whether less is better
    ("second", "stock handler", 1 / 20, True),
    ("second", "llama-server", 1.0, True),
    ("prepared", "stock handler", 1 / 20, True),
    ("prepared", "llama-server", 1.0, True),
    ("cold", "llama-server", 1.0, True),
    ("decoding", "llama-server", 0.95, False),
)
Ask = Callable[[bytes, str, int], tuple[float, float]]  # image, question, tokens -> first token s, tokens/s


def measure(ask: Ask, pictures: list[bytes], tokens: int) -> dict[str, float]:
    """What every side is asked, in this order; the first picture only warms it up."""
    ask(pictures[0], FIRST, 4)
    cold, speed = ask(pictures[1], FIRST, tokens)
    second, again = ask(pictures[1], SECOND, tokens)
    ask(pictures[2], FIRST, 4)
    back, _ = ask(pictures[1], FIRST, 4)
    return {"cold": cold, "second": second, "back": back, "decoding": max(speed, again)}


def pocketllava_side(bundle: Bundle, pictures: list[bytes], tokens: int, cache: str) -> dict[str, float]:
    """Llava, as a program uses it."""
    with Llava.load(bundle.folder, n_ctx=CONTEXT) as llava:

        def ask(image: bytes, question: str, n: int) -> tuple[float, float]:
            timings = llava.ask(image, question, options=Options(max_tokens=n)).timings
            return timings.first_token_s, timings.tokens_per_s

        found = measure(ask, pictures, tokens)
        llava.prepare(pictures[3]).wait()
        found["prepared"] = ask(pictures[3], FIRST, 4)[0]
        found["peak"] = peak_bytes() / 1e9
    for name, keep in (("seen", False), ("kept", True)):
        folder = Path(cache) / name
        for _ in range(2):  # the second time it is there; another process would find the same files
            with Llava.load(bundle.folder, n_ctx=CONTEXT, cache_dir=folder, keep_prefixes=keep) as llava:
                timings = llava.ask(pictures[1], FIRST, options=Options(max_tokens=4)).timings
        found[name] = timings.first_token_s
        if not keep:
            found["seen_encode"] = timings.encode_s
    return found


def stock_side(bundle: Bundle, pictures: list[bytes], tokens: int, _cache: str) -> dict[str, float]:
    """llama_cpp.Llama with its own handler. Its tokens are noted as they are sampled, since some have no text."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    handler = Llava15ChatHandler(clip_model_path=str(bundle.mmproj), verbose=False)
    llama = Llama(str(bundle.model), chat_handler=handler, n_ctx=CONTEXT, n_threads=cores(), verbose=False)
    generate, times = llama.generate, []

    def noted(*args: Any, **kwargs: Any) -> Iterator[int]:
        for token in generate(*args, **kwargs):
            times.append(time.perf_counter())
            yield token

    llama.generate = noted  # type: ignore[method-assign]

    def ask(image: bytes, question: str, n: int) -> tuple[float, float]:
        times.clear()
        start = time.perf_counter()
        content = [{"type": "image_url", "image_url": data_uri(image)}, {"type": "text", "text": question}]
        messages: Any = [{"role": "user", "content": content}]
        llama.create_chat_completion(messages, max_tokens=n, temperature=0.0, repeat_penalty=1.0)
        return times[0] - start, (len(times) - 1) / (times[-1] - times[0]) if len(times) > 8 else 0.0

    return {**measure(ask, pictures, tokens), "peak": peak_bytes() / 1e9}


def server_side(bundle: Bundle, pictures: list[bytes], tokens: int, _cache: str) -> dict[str, float]:
    """llama-server with one slot, over its OpenAI endpoint. Warm-up at its start, as is its default."""
    with llama_server(bundle) as (port, process):

        def ask(image: bytes, question: str, n: int) -> tuple[float, float]:
            content = [
                {"type": "image_url", "image_url": {"url": data_uri(image)}},
                {"type": "text", "text": question},
            ]
            request = {
                "messages": [{"role": "user", "content": content}], "max_tokens": n, "temperature": 0, "stream": True,
                "cache_prompt": True, "timings_per_token": True, "ignore_eos": True,
            }  # fmt: skip
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1200)
            start = time.perf_counter()
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(request), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"llama-server: status {response.status}: {response.read(300)!r}")
            first, timings = 0.0, {}
            for line in response:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter() - start
                    timings = json.loads(line[6:]).get("timings", timings)
            connection.close()
            return first, float(timings.get("predicted_per_second", 0.0))

        found = measure(ask, pictures, tokens)
        found["peak"] = server_peak(process.pid) / 1e9
    return found


@contextmanager
def llama_server(bundle: Bundle) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A running server's port and process; killed in any case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        os.environ["LLAMA_SERVER"], "-m", str(bundle.model), "--mmproj", str(bundle.mmproj), "-c", str(CONTEXT),
        "-t", str(cores()), "-tb", str(cores()), "--parallel", "1", "-ngl", "0", "--host", "127.0.0.1",
        "--port", str(port),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"llama-server: exit code {process.returncode} at its start")
            if healthy(port):
                break
            time.sleep(0.5)
        yield port, process
    finally:
        process.kill()
        process.wait()


def healthy(port: int) -> bool:
    """Whether the server has loaded its model."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def server_peak(pid: int) -> int:
    """The most memory a process had resident, where the system tells; else what it has now."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        line = next(row for row in status.read_text("utf-8").splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


MEASURES = dict(zip(SIDES, (pocketllava_side, stock_side, server_side), strict=True))


def drawn(image: str, n: int) -> list[bytes]:
    """n PNG files of the picture that differ in a little noise."""
    from pocketllava.image import MAX_PIXELS, load

    picture, files = load(image, MAX_PIXELS), []
    for _ in range(n):
        data = io.BytesIO()
        unseen(picture).save(data, "PNG")
        files.append(data.getvalue())
    return files


def one_side(arguments: argparse.Namespace) -> None:
    """A child process: measure one side and print one JSON line."""
    pictures = [Path(p).read_bytes() for p in arguments.pictures]
    with tempfile.TemporaryDirectory() as cache:
        found = MEASURES[arguments.side](Bundle.open(arguments.bundle), pictures, arguments.tokens, cache)
    print(json.dumps(found))


def in_turn(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Every side in a process of its own, round after round."""
    sides = [s for s in SIDES if s != "llama-server" or "LLAMA_SERVER" in os.environ]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for file in (Bundle.open(arguments.bundle).model, Bundle.open(arguments.bundle).mmproj):
        with file.open("rb") as read:
            while read.read(1 << 24):
                pass
    for n in range(arguments.runs):
        for side in sides[n % len(sides) :] + sides[: n % len(sides)]:
            with tempfile.TemporaryDirectory() as folder:
                paths = [Path(folder) / f"{k}.png" for k in range(4)]
                for path, data in zip(paths, drawn(arguments.image, 4), strict=True):
                    path.write_bytes(data)
                command = [
                    sys.executable,
                    __file__,
                    arguments.bundle,
                    "--side",
                    side,
                    "--tokens",
                    str(arguments.tokens),
                ]
                done = subprocess.run(
                    [*command, "--pictures", *map(str, paths)], capture_output=True, text=True, check=False
                )
            if done.returncode:
                raise SystemExit(f"{side}: {done.stderr[-1500:]}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {n + 1}, {side}: {found[side][-1]}", file=sys.stderr)
    return found


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """Medians as markdown, then the ratios that are aimed at."""
    medians = {
        side: {row: statistics.median(r[row] for r in rounds) for row, _ in ROWS if row in rounds[0]}
        for side, rounds in found.items()
    }
    sides = list(medians)
    lines = [f"| | {' | '.join(sides)} |", "|---" * (len(sides) + 1) + "|"]
    for row, name in ROWS:
        cells = (f"{medians[s][row]:.3g}" if medians[s].get(row) else "-" for s in sides)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| pocketllava's ratio to | | goal |", "|---|---|---|"]
    ours = medians["pocketllava"]
    for row, peer, bound, less in GOALS:
        if peer in medians:
            theirs = medians[peer]["second" if row == "prepared" else row]
            if theirs:
                name = dict(ROWS)[row].rpartition(",")[0]
                sign = "<=" if less else ">="
                lines.append(f"| {peer}: {name} | {ours[row] / theirs:.3g} | {sign} {bound:.3g} |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--image", default=str(Path(__file__).parent.parent / "tests" / "photo.jpg"))
    parser.add_argument("-n", "--runs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--pictures", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        one_side(arguments)
        return
    found = in_turn(arguments)
    manifest = Bundle.open(arguments.bundle).manifest
    what = f"{manifest['source']['id']}, {manifest['types']['model']} + {manifest['types']['mmproj']}"
    print(f"{what}, {platform.machine()}, {cores()} cores, n_ctx {CONTEXT}, median of {arguments.runs}\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()

"""`pocketllava serve` beside llama-server on the same two files: first tokens, second questions, clients in turns.

    python benchmarks/serving.py BUNDLE LLAMA_SERVER [--image FILE] [--runs N] [--clients N] [--turns N] [--ctx N]
        [--threads N]

BUNDLE is a folder with model.gguf and mmproj.gguf, or a model's name, LLAMA_SERVER llama.cpp's own program. Both run,
with the same threads and greedy decoding, and are asked in turns; the last column is what the one that rests takes
meanwhile. "New picture" and "second question" are seconds until the first word, alone. Then clients with their own
pictures ask in turns, all at once: llama-server gets a slot and a context for each. Run it on a quiet machine.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from arguments import about, arguments, image_part
from PIL import Image

from pocketllava.names import open_bundle

QUESTIONS = (
    "Describe this image.",
    "What color is it mostly?",
    "How many things are there?",
    "Is it outdoors?",
)
TOKENS = 32
START_S = 600.0


@dataclass
class Client:
    """One conversation about one picture."""

    port: int
    picture: bytes
    turns: list[dict[str, Any]] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)

    def ask(self, question: str) -> None:
        """One more turn, and how long it took."""
        text: list[Any] = [{"type": "text", "text": question}]
        content = text if self.turns else [image_part(self.picture), *text]
        self.turns.append({"role": "user", "content": content})
        body = {"messages": self.turns, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        start, first, answer = time.perf_counter(), 0.0, ""
        for piece in _pieces(self.port, body):
            first = first or time.perf_counter() - start
            answer += piece
        self.first_s.append(first)
        self.whole_s.append(time.perf_counter() - start)
        self.turns.append({"role": "assistant", "content": answer})


def _pieces(port: int, body: dict[str, Any]) -> Iterator[str]:
    """The texts of a streamed answer."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)) as connection:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"server: {response.status} {response.read()[:300]!r}")
        for line in response:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and (text := choices[0]["delta"].get("content")):
                    yield text


def main() -> None:
    """Measure both, and print a table."""
    ap = arguments(__doc__)
    ap.add_argument("llama_server", type=Path)
    ap.add_argument("--clients", type=int, default=4)
    ap.add_argument("--turns", type=int, default=3)
    ap.add_argument("--ctx", type=int, default=2048)
    ap.add_argument("--threads", type=int, default=2)
    a = ap.parse_args()
    pictures = _pictures(Path(a.image), 1 + a.runs + a.clients)
    with ExitStack() as stack:
        servers = {name: stack.enter_context(_running(command)) for name, command in _commands(a).items()}
        rows = _measured(servers, pictures, a.runs, a.turns)
    print(about(runs=a.runs, clients=a.clients, turns=a.turns, tokens=TOKENS, threads=a.threads))
    heads = ("new picture, s", "second question, s", "turn's first word, s", "slowest, s", "answers a minute")
    print(f"\n| | {' | '.join(heads)} | CPU while the other was asked, s |\n|---|{'---|' * (len(heads) + 1)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |")


def _commands(a: Any) -> dict[str, list[str]]:
    """Both servers, without their ports."""
    bundle, threads = open_bundle(a.bundle), str(a.threads)
    slots = ["-np", str(a.clients), "-c", str(a.ctx * a.clients)]
    llama = ["-m", str(bundle.model), "--mmproj", str(bundle.mmproj), "-t", threads]
    ours = ["serve", a.bundle, "--ctx", str(a.ctx), "--threads", threads, "--queue", str(2 * a.clients)]
    return {
        "pocketllava serve": [sys.executable, "-m", "pocketllava", *ours],
        "llama-server": [str(a.llama_server), *llama, *slots],
    }


@dataclass
class Server:
    """A program that answers, and what it took."""

    port: int
    process: psutil.Process
    alone: list[Client] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    minutes: float = 0.0
    idle_cpu_s: float = 0.0

    def cpu_s(self) -> float:
        """Seconds of CPU time of its processes so far."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in family)

    def ask_alone(self, picture: bytes) -> None:
        """A new picture, and a second question about it."""
        client = Client(self.port, picture)
        client.ask(QUESTIONS[0])
        client.ask(QUESTIONS[1])
        self.alone.append(client)

    def ask_together(self, pictures: list[bytes], turns: int) -> None:
        """A client for each picture, all at once."""
        self.clients = [Client(self.port, picture) for picture in pictures]
        questions = [QUESTIONS[n % len(QUESTIONS)] for n in range(turns)]
        start = time.perf_counter()
        with ThreadPoolExecutor(len(pictures)) as pool:
            list(pool.map(lambda client: [client.ask(question) for question in questions], self.clients))
        self.minutes = (time.perf_counter() - start) / 60

    def row(self) -> list[float]:
        """Of the table."""
        later = [second for client in self.clients for second in client.first_s[1:] or client.first_s]
        return [
            statistics.median(client.first_s[0] for client in self.alone),
            statistics.median(client.first_s[1] for client in self.alone),
            statistics.median(later),
            max(later),
            sum(len(client.first_s) for client in self.clients) / self.minutes,
            self.idle_cpu_s,
        ]


def _measured(
    servers: dict[str, Server], pictures: list[bytes], runs: int, turns: int
) -> dict[str, list[float]]:
    """The table's rows. The first picture warms up; the next are asked about alone, the last by clients at once."""
    for server in servers.values():
        server.ask_alone(pictures[0])
        server.alone.clear()
    for picture in pictures[1 : runs + 1]:
        for server in servers.values():
            with _others_rest(server, servers):
                server.ask_alone(picture)
    for server in servers.values():
        with _others_rest(server, servers):
            server.ask_together(pictures[runs + 1 :], turns)
    return {name: server.row() for name, server in servers.items()}


@contextmanager
def _others_rest(asked: Server, servers: dict[str, Server]) -> Iterator[None]:
    """Notes the CPU time that the other servers take."""
    others = [server for server in servers.values() if server is not asked]
    before = [server.cpu_s() for server in others]
    yield
    for server, cpu_s in zip(others, before, strict=True):
        server.idle_cpu_s += server.cpu_s() - cpu_s


def _pictures(path: Path, count: int) -> list[bytes]:
    """The picture with another mark each time, as JPEG."""
    rng, found = np.random.default_rng(0), []
    with Image.open(path) as image:
        picture = image.convert("RGB")
    for _ in range(count):
        marked, file = picture.copy(), io.BytesIO()
        marked.paste(
            tuple(map(int, rng.integers(0, 255, 3))), (0, 0, picture.width // 4, picture.height // 4)
        )
        marked.save(file, "JPEG")
        found.append(file.getvalue())
    return found


@contextmanager
def _running(command: list[str]) -> Iterator[Server]:
    """A server, once it is well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + START_S
        while not _well(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{command[0]}: did not start (exit code {process.poll()})")
            time.sleep(0.1)
        yield Server(port, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(20)


def _well(port: int) -> bool:
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
    except OSError:
        return False


if __name__ == "__main__":
    main()

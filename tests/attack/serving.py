"""Attacks a running server: clients that leave, engines that are killed, slow sockets, foreign names, mixed load.

    PYTHONPATH=$PWD/tests python -m attack.serving CAMPAIGN [CASES_OR_MINUTES [SEED]]

In the table, *accepted* are cases that went as they must, *hangs* those that took too long, *wrong* a wrong answer.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
from attack.counts import Counts
from attack.server import CHAT, Served, long_request, request, served
from attack.steps import CPU_S, work_left_s
from processes import cpu_s

PHASES = ("queued", "image", "encoding", "prompt", "decoding")
SIDE = 2000  # of the picture that is being decoded when its client leaves
FREE_S, HUNG_UP_S = 20.0, 10.0  # by the clock, amid a phase, and in mixed load, which needs a core of its own
ORPHAN_S = 1.0
GOOD_S = 2.0
N_SLOW = 200
N_PICTURES = 64  # of mixed load: their features are kept, up to 128 MB of them
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # which ends a process at once on Windows
STATES = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def disconnects(seed: int, cases: int, folder: Path) -> Counts:
    """So many in each phase and mode: the engine is free within a step, and the next answer is right."""
    counts, rng = Counts(), random.Random(seed)
    with served() as server:
        spans = _phases(server, rng)
        short = long_request(rng, SIDE, stream=False) | {"max_tokens": 1}
        most_s = work_left_s(server.engine, lambda: server.send("POST", CHAT, short))
        for phase in PHASES:
            for stream in (False, True):
                for _ in range(cases):
                    _leave(server, phase, spans, rng, counts, most_s, stream=stream)
                _judge(server.right(), f"after {phase}: the next answer", counts)
                counts.cases += 1
    return counts


def _phases(server: Served, rng: random.Random) -> dict[str, tuple[float, float]]:
    """Where each phase lies in a request's time, in seconds, as such a request says itself."""
    data = json.loads(server.send("POST", CHAT, long_request(rng, SIDE, stream=False))[1])
    ms = data["timings"]
    ends = [ms["image_ms"], ms["encode_ms"], ms["prompt_ms"], ms["predicted_ms"]]
    spans, at = {}, 0.0
    for phase, length in zip(PHASES[1:], ends, strict=True):
        spans[phase] = (at, at + length / 1000)
        at += length / 1000
    return spans | {"queued": (0.0, 0.2)}


def _leave(
    server: Served, phase: str, spans: dict[str, tuple[float, float]], rng: random.Random, counts: Counts,
    most_s: float, *, stream: bool,
) -> None:  # fmt: skip
    """Ask, leave amid a phase, and wait for the engine, which may work for most_s more."""
    counts.cases += 1
    with ExitStack() as stack:
        if phase == "queued":
            stack.enter_context(server.ask(long_request(rng, 96, stream=True)))
        connection = server.ask(long_request(rng, SIDE, stream=stream))
        time.sleep(rng.uniform(*spans[phase]))
        before = cpu_s(server.engine)
        connection.close()
    free_s = FREE_S + most_s
    took, worked = _until_free(server, before, free_s)
    good = took < free_s and worked <= most_s
    counts.accepted += good
    if not good:
        counts.hangs += 1
        counts.failures.append(
            f"{phase}, stream {stream}: free after {took:.2f} s, {worked:.2f} s of work, {most_s:.2f} at most"
        )


def _until_free(server: Served, worked_s: float, most_s: float) -> tuple[float, float]:
    """(seconds until nothing runs or waits, at most so many; of the engine's work since it had worked for worked_s)."""
    return server.idle_after(most_s), cpu_s(server.engine) - worked_s


def kills(seed: int, cases: int, folder: Path, number: int = KILL) -> Counts:
    """The engine ends by a signal amid an answer: the server lives, and answers the next question."""
    counts, rng = Counts(), random.Random(seed)
    with served() as server:
        for n in range(cases):
            counts.cases += 1
            _wait(lambda: bool(server.process.children()), 10)
            engine, restarts = server.engine, _restarts(server)
            with server.ask(long_request(rng, 96, stream=bool(n % 2))):
                time.sleep(rng.uniform(0, 0.3))
                engine.send_signal(number)
                _wait(lambda e=engine: _gone(e), 10)  # type: ignore[misc]
                _wait(lambda before=restarts: _restarts(server) > before or server.idle(), 10)  # type: ignore[misc]
            if server.process.poll() is not None:
                counts.crashes += 1
                counts.failures.append(f"case {n}: the server ended")
                return counts
            found = server.chat()  # asked once
            _judge(found == (200, server.answer), f"case {n}: the next answer, {found},", counts)
    return counts


def aborts(seed: int, cases: int, folder: Path) -> Counts:
    """The same with SIGABRT, as ggml's assertions end a process."""
    return kills(seed, cases, folder, signal.SIGABRT)


def _restarts(server: Served) -> float:
    lines = server.send("GET", "/metrics")[1].decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("pocketllava_engine_restarts"))


def orphans(seed: int, cases: int, folder: Path) -> Counts:
    """The server is killed, while its engine works or rests: the engine goes within a second."""
    counts, rng = Counts(), random.Random(seed)
    for n in range(cases):
        counts.cases += 1
        with served() as server:
            engine = server.engine
            with server.ask(long_request(rng, 96, stream=True)) if n % 2 else ExitStack():
                time.sleep(rng.uniform(0, 0.3))
                server.process.kill()
                gone = _wait(lambda e=engine: _gone(e), ORPHAN_S)  # type: ignore[misc]
        counts.accepted += gone
        if not gone:
            counts.leaks += 1
            counts.failures.append(f"case {n}: the engine was there after {ORPHAN_S} s")
    return counts


def slow_sockets(seed: int, cases: int, folder: Path) -> Counts:
    """A good request beside 200 sockets that send half a head, or a head and half a body."""
    counts = Counts()
    data = json.dumps(request()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n".encode()
    with served() as server, ExitStack() as stack:
        for n in range(N_SLOW):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            slow.sendall((head + data)[: len(head) // 2 if n % 2 else len(head) + n])
        for n in range(cases):
            start = time.monotonic()
            right, took = server.right(), time.monotonic() - start
            counts.cases += 1
            _judge(right, f"case {n}: the good request", counts)
            if took > GOOD_S:
                counts.hangs += 1
                counts.failures.append(f"case {n}: the good request took {took:.2f} s")
    return counts


HOSTS = {
    "localhost": True, "127.0.0.1": True, "[::1]": True, "192.168.1.9": True, "LOCALHOST": True, "": False,
    "evil.example": False, "localhost.evil.example": False, "127.0.0.1.nip.io": False, "a@localhost": False,
    "localhost/": False, "[::1": False, "known.example": True,
}  # fmt: skip
ORIGINS = {
    None: True, "app://obsidian.md": True, "http://{host}": True, "https://{host}": True, "null": False,
    "http://evil.example": False, "http://{host}.evil.example": False, "app://obsidian.md.evil": False,
}  # fmt: skip
PATHS = (
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("GET", "/api/tags"),
    ("POST", CHAT),
    ("GET", "/no"),
)
BINDS = {
    "127.0.0.1": True,
    "::1": True,
    "localhost": True,
    "0.0.0.0": False,
    "::": False,
    "192.168.1.9": False,
}


def names(seed: int, cases: int, folder: Path) -> Counts:
    """Every Host with every Origin on every kind of route, and every address to listen at without a key."""
    counts = Counts()
    with served("--origin", "app://obsidian.md", "--allow-host", "known.example") as server:
        for host, ours in HOSTS.items():
            for origin, may in ORIGINS.items():
                for method, path in PATHS:
                    counts.cases += 1
                    headers = {"Host": f"{host}:{server.port}" if ours else host}
                    if origin is not None:
                        headers["Origin"] = origin.format(host=headers["Host"])
                    status, _ = server.send(method, path, request() if method == "POST" else None, **headers)
                    expected = ours and may
                    counts.refused += status in (400, 403)
                    _judge((status in (200, 404)) == expected, f"{method} {path} {headers}: {status}", counts)
    counts.accepted -= counts.refused
    for address, may in BINDS.items():
        command = [sys.executable, "-m", "pocketllava", "serve", "demo", "--port", "0", "--host", address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        line = process.stdout.readline() if process.stdout else ""
        process.kill()
        process.communicate()
        counts.cases += 1
        listens = line.startswith("page:") or "cannot listen" in line  # no IPv6 here
        counts.refused += not listens
        _judge(listens == may, f"--host {address}: {line}", counts, quiet=not listens)
    return counts


def mixed_load(seed: int, minutes: int, folder: Path) -> Counts:
    """Answers, clients that leave, refusals and status, for so many minutes: memory and descriptors stay flat."""
    counts, rng = Counts(), random.Random(seed)
    with served() as server:
        works: list[Callable[[], bool]] = [
            server.right,
            lambda: server.send("POST", CHAT, request("x", "data:image/png;base64,AAAA"))[0] == 400,
            lambda: server.send("POST", CHAT, {"model": "other", "messages": []})[0] in (400, 404),
            lambda: server.send("GET", "/v1/models")[0] == 200,
            lambda: server.chat("How many?", max_tokens=4)[0] == 200,
            lambda: server.send("POST", CHAT, request(image=_new(rng)))[0] == 200,
            lambda: _hang_up(server, rng),
        ]
        end, samples = time.monotonic() + 60 * minutes, []
        while time.monotonic() < end:
            counts.cases += 1
            _judge(rng.choice(works)(), f"case {counts.cases}", counts)
            if counts.cases % 20 == 0:
                if _restarts(server):
                    counts.crashes += 1
                    counts.failures.append(f"case {counts.cases}: the engine ended")
                    return counts
                samples.append((time.monotonic(), *_size(server.process), *_size(server.engine)))
    _flat(samples, counts)
    return counts


def _new(rng: random.Random) -> str:
    from attack.server import uri

    return uri(96, 80, rng.randrange(N_PICTURES))


def _hang_up(server: Served, rng: random.Random) -> bool:
    few = random.Random(rng.randrange(N_PICTURES))
    with server.ask(long_request(few, 200, stream=rng.random() < 0.5)):
        time.sleep(rng.uniform(0, 0.3))
        before = cpu_s(server.engine)
    took, worked = _until_free(server, before, HUNG_UP_S)
    return took < HUNG_UP_S and worked <= CPU_S


def _size(process: psutil.Process) -> tuple[float, int]:
    """(MB in memory, open descriptors)."""
    return process.memory_info().rss / 1e6, process.num_fds() if os.name != "nt" else process.num_handles()


def _flat(samples: list[tuple[float, float, int, float, int]], counts: Counts) -> None:
    """The second half is no larger than the first, but for a twentieth and what caches may still take."""
    half = len(samples) // 2
    for column, name, slack in ((1, "server MB", 8), (2, "server descriptors", 3), (3, "engine MB", 16), (4, "engine descriptors", 3)):  # fmt: skip
        early, late = (
            max(s[column] for s in part) for part in (samples[half // 2 : half + 1], samples[half:])
        )
        print(f"{name}: {early:.0f} in the second quarter, {late:.0f} in the second half", file=sys.stderr)
        counts.cases += 1
        is_flat = late <= early * 1.05 + slack
        counts.accepted += is_flat
        if not is_flat:
            counts.leaks += 1
            counts.failures.append(f"{name}: {early:.0f}, then {late:.0f}")


def _gone(process: psutil.Process) -> bool:
    """Whether it ended, even if its parent has not looked."""
    try:
        return not process.is_running() or process.status() in STATES
    except psutil.NoSuchProcess:
        return True


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it held within so many seconds."""
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


def _judge(good: bool, what: str, counts: Counts, *, quiet: bool = False) -> None:
    counts.accepted += good and not quiet
    if not good:
        counts.wrong += 1
        counts.failures.append(f"{what}: was not as it must be")


CAMPAIGNS: dict[str, tuple[Callable[[int, int, Path], Counts], int]] = {
    "disconnects": (disconnects, 20),
    "kills": (kills, 100),
    "aborts": (aborts, 20),
    "orphans": (orphans, 10),
    "slow sockets": (slow_sockets, 20),
    "names": (names, 1),
    "mixed load": (mixed_load, 10),
}

if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    campaign, usual = CAMPAIGNS[name]
    amount = int(numbers[0]) if numbers else usual
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        found = campaign(int(numbers[1]) if len(numbers) > 1 else 0, amount, Path(scratch))
    print(*found.failures[:20], sep="\n")
    print(name, amount, {**vars(found), "failures": len(found.failures)}, f"{time.monotonic() - start:.0f} s")

"""`pocketllava serve demo` as a process of its own, for tests of what asks it. Knows addresses; no client."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SCENE = Path(__file__).parents[1] / "examples" / "scene.png"
QUESTION, SECOND = "What is at the center?", "How many objects are there?"
LOAD_S = 60.0


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """The server's address, once the model is loaded."""
    command = [sys.executable, "-m", "pocketllava", "serve", "demo", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            found = re.search(r"http://[\d.]+:\d+", child.stdout.readline())
            assert found is not None, "no address"
            _wait(found[0])
            yield found[0]
        finally:
            child.terminate()


def _wait(address: str) -> None:
    """Until /health is 200."""
    end = time.monotonic() + LOAD_S
    while time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=10):
            return
        time.sleep(0.05)
    raise TimeoutError(address)


def post(address: str, path: str, body: Any, **headers: str) -> tuple[int, bytes]:
    """(status, body) of one request."""
    data = json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(address + path, data, {"content-type": "application/json"} | named)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()

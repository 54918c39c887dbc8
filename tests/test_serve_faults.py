"""What goes wrong around a server, and must not matter: a few of each campaign of tests/attack."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from http.client import HTTPConnection
from pathlib import Path

import pytest
import uvicorn
from attack import isolated, serving
from attack.counts import Counts
from attack.server import Served, served
from starlette.applications import Starlette

from pocketllava.serve.connection import Timely, config

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals")


class Quick(Timely):
    """Does not wait long for headers."""

    headers_s = 0.3


@pytest.fixture(scope="module")
def idle_server() -> Iterator[Served]:
    with served("--idle", "5") as server:
        yield server


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server with quick connections and no routes."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config(Starlette(), Quick))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join(10)
    listener.close()


@pytest.mark.parametrize(
    ("before", "start"),
    [
        (b"", b""),
        (b"", b"GET / HTT"),
        (b"", b"GET / HTTP/1.1\r\nhost: localhost\r\nx-a: b\r\n"),
        (b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n", b"GET / HTTP/1.1\r\nx"),
    ],
)
def test_headers_that_never_end_are_not_waited_for(port: int, before: bytes, start: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        if before:
            slow.sendall(before)
            assert slow.recv(4096).startswith(b"HTTP/1.1 404")
        slow.sendall(start)
        started = time.monotonic()
        with suppress(OSError):  # closed while it sent
            for _ in range(5):  # a byte now and then does not help
                time.sleep(0.05)
                slow.sendall(start and b"x")
            while slow.recv(4096):
                pass
        assert time.monotonic() - started < 4  # an idle connection is kept for 5 s


def test_a_quick_client_keeps_its_connection(port: int) -> None:
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as client:
        client.connect()
        address = client.sock.getsockname()
        for _ in range(4):
            client.request("GET", "/")
            assert client.getresponse().read() == b"Not Found"
            time.sleep(0.2)  # longer than headers may take, all in all
            assert client.sock.getsockname() == address


def test_ollama_is_told_when_the_model_is_freed(idle_server: Served) -> None:
    (row,) = json.loads(idle_server.send("GET", "/api/ps")[1])["models"]
    left = datetime.fromisoformat(row["expires_at"]) - datetime.now(timezone.utc)
    assert timedelta(minutes=4) < left <= timedelta(minutes=5)


def test_metrics_name_what_they_count(idle_server: Served) -> None:
    text = idle_server.send("GET", "/metrics")[1].decode()
    assert "pocketllava_answers_with_new_images_total 1.0" in text.splitlines()


def check(counts: Counts) -> None:
    assert counts.cases
    assert not counts.failures


@POSIX
@pytest.mark.parametrize("campaign", ["kills", "aborts", "orphans", "slow sockets"])
def test_a_part_of_a_campaign(campaign: str, tmp_path: Path) -> None:
    check(serving.CAMPAIGNS[campaign][0](1, 2, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("campaign", ["disconnects", "names"])
def test_a_part_of_a_long_campaign(campaign: str, tmp_path: Path) -> None:
    check(serving.CAMPAIGNS[campaign][0](1, 1, tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors")
def test_calls_leave_nothing(tmp_path: Path) -> None:
    check(isolated.calls(1, 60, tmp_path))


def test_a_call_ends_in_every_phase(tmp_path: Path) -> None:
    check(isolated.cancels(1, 2, tmp_path))

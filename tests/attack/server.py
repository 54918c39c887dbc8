"""A real `pocketllava serve demo` in a process of its own, and its clients. Knows HTTP; counts nothing."""

from __future__ import annotations

import base64
import functools
import http.client
import io
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
from pictures import scene
from PIL import Image

CHAT = "/v1/chat/completions"
QUESTION = "What is at the center?"
WORDS = ["red", "blue", "green", "heart", "star", "circle", "left", "right"]
LONG = {"type": "string", "minLength": 900}  # an answer that takes a while
START_S = 60.0


@dataclass
class Served:
    """The process, its address, and the right answer to QUESTION."""

    process: psutil.Popen
    port: int
    answer: str = ""

    @property
    def engine(self) -> psutil.Process:
        """The child that holds the model. Raises IndexError while there is none."""
        children: list[psutil.Process] = self.process.children()
        return children[0]

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """(status, body)."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"content-type": "application/json", **headers})
            response = connection.getresponse()
            return response.status, response.read()

    def chat(self, text: str = QUESTION, **fields: Any) -> tuple[int, Any]:
        """(status, the answer's text, or the error) about the usual picture."""
        status, data = self.send("POST", CHAT, request(text, **fields))
        body = json.loads(data)
        return status, body["choices"][0]["message"]["content"] if status == 200 else body["error"]

    def right(self) -> bool:
        """Whether the usual question gets its answer."""
        return self.chat() == (200, self.answer)

    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        lines = self.send("GET", "/metrics")[1].decode().splitlines()
        gauges = [line for line in lines if line.startswith("pocketllava_requests_")]
        return len(gauges) == 2 and all(line.endswith(" 0.0") for line in gauges)

    def idle_after(self, most_s: float) -> float:
        """Seconds until nothing runs or waits, at most so many."""
        start = time.monotonic()
        while not self.idle() and time.monotonic() - start < most_s:
            time.sleep(0.005)
        return time.monotonic() - start

    def ask(self, body: dict[str, Any]) -> socket.socket:
        """A request that was sent, whose answer nobody has read."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        return connection


@functools.lru_cache(maxsize=4)
def _drawn(width: int, height: int) -> Image.Image:
    return scene(width, height)


def uri(width: int = 96, height: int = 80, mark: int = 0) -> str:
    """A picture; another one for each mark."""
    picture = _drawn(width, height).copy()
    color = (mark % 256, mark // 256 % 256, mark // 65536)
    picture.paste(color, (0, 0, width // 3, height // 3))
    file = io.BytesIO()
    picture.save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def request(text: str = QUESTION, image: str | None = None, **fields: Any) -> dict[str, Any]:
    """A question about a picture."""
    url = {"url": image or uri()}
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": url}]
    return {"model": "llava", "messages": [{"role": "user", "content": content}], "max_tokens": 16} | fields


def long_request(rng: random.Random, side: int, *, stream: bool) -> dict[str, Any]:
    """One with a new picture, a long prompt and a long answer, so that each phase takes a while."""
    text = " ".join(rng.choices(WORDS, k=400))
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": LONG}}
    image = uri(side, side, rng.randrange(1 << 24))
    return request(text, image, stream=stream, max_tokens=800, temperature=1.5, response_format=schema)


@contextmanager
def served(*options: str) -> Iterator[Served]:
    """A server that has loaded its model, until the block ends."""
    command = [sys.executable, "-m", "pocketllava", "serve", "demo", "--port", "0", *options]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        server = Served(process, int(process.stdout.readline().rsplit(":", 1)[1]))
        end = time.monotonic() + START_S
        while server.send("GET", "/health")[0] != 200 and time.monotonic() < end:
            time.sleep(0.02)
        status, server.answer = server.chat()
        assert status == 200, server.answer
        yield server
    finally:
        process.terminate()
        process.communicate(timeout=20)

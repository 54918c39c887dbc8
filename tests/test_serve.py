"""The server on loopback, as its clients use it: real sockets, the demo model, the bodies that real clients sent."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import machines
import psutil
import pytest
import uvicorn
from click.testing import CliRunner
from pictures import png, scene
from processes import cpu_s

from pocketllava import Llava, Message, Options
from pocketllava.album.gallery import Gallery
from pocketllava.cli import cli
from pocketllava.names import open_bundle
from pocketllava.serve.app import build
from pocketllava.serve.guard import Access
from pocketllava.serve.served import Limits, Served
from pocketllava.serve.supervisor import Supervisor, load_engine
from pocketllava.types import Chunk

# llguidance calls a deprecated name of llama_cpp, in the engine's thread.
pytestmark = pytest.mark.filterwarnings("ignore:llama_token_get_attr:DeprecationWarning")

QUESTION = "What is at the center?"
PICTURE = png(scene(96, 80))
BASE64 = base64.b64encode(PICTURE).decode()
URI = f"data:image/png;base64,{BASE64}"
CHAT = "/v1/chat/completions"
KEY = "a-key-of-the-test"
MAX_TOKENS_LATE = 20  # of 900: those on their way when it was cancelled, and the one that was being evaluated
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@dataclass
class Reply:
    """A whole answer of the server."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.data)

    @property
    def lines(self) -> list[Any]:
        """NDJSON, parsed."""
        return [json.loads(line) for line in self.data.splitlines()]

    @property
    def events(self) -> list[Any]:
        """Server-sent events, parsed, without comments."""
        texts = [line[6:] for line in self.data.decode().splitlines() if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]


@dataclass
class Server:
    """A server that runs in a thread."""

    port: int
    supervisor: Supervisor

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request on a connection of its own."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            kind = {"content-type": "application/json"} if body is not None else {}
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, kind | names)
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def get(self, path: str, **headers: str) -> Reply:
        """GET."""
        return self.send("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """POST of JSON."""
        return self.send("POST", path, body, **headers)

    def chat(self, content: Any = None, **fields: Any) -> Reply:
        """One question in OpenAI's form."""
        turns = [{"role": "user", "content": content or parts()}]
        return self.post(CHAT, {"model": "llava", "messages": turns, "max_tokens": 16} | fields)

    def until(self, condition: Any, seconds: float = 20) -> None:
        """Wait until it holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)


def parts(*, image_first: bool = False) -> list[dict[str, Any]]:
    """A question about the picture."""
    both: list[dict[str, Any]] = [
        {"type": "text", "text": QUESTION},
        {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
    ]
    return both[::-1] if image_first else both


def running(
    access: Access, limits: Limits = Limits(), gallery: Gallery | None = None, **options: Any  # noqa: B008
) -> Iterator[Server]:  # fmt: skip
    """A server until the test ends."""
    supervisor = Supervisor(partial(load_engine, "demo", {}), **options)
    app = build(supervisor, Served("demo", open_bundle("demo"), limits=limits), access, gallery)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    running = Server(listener.getsockname()[1], supervisor)
    try:
        running.until(lambda: supervisor.state == "ok")
        yield running
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Without a key; two requests may wait."""
    yield from running(Access(origins=("app://obsidian.md",)), Limits(body_bytes=1 << 20, images=3), queue=2)


@pytest.fixture(scope="module")
def answer() -> str:
    """What Llava.ask says."""
    with Llava.load("demo") as llava:
        return llava.ask(PICTURE, QUESTION, options=Options(max_tokens=16)).text


@pytest.mark.parametrize("path", [CHAT, "/chat/completions"])
@pytest.mark.parametrize("image_first", [False, True])
def test_the_answer_is_that_of_ask(server: Server, answer: str, path: str, image_first: bool) -> None:
    turns = [{"role": "user", "content": parts(image_first=image_first)}]
    reply = server.post(path, {"model": "llava", "messages": turns, "max_completion_tokens": 16}).json
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": answer, "refusal": None}
    assert choice["finish_reason"] in ("stop", "length")
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "demo"
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 36
    assert reply["timings"]["predicted_n"] == usage["completion_tokens"]
    assert reply["timings"]["device"]


def test_chunks_come_in_order(server: Server, answer: str) -> None:
    events = server.chat(stream=True, stream_options={"include_usage": True}).events
    *chunks, usage, done = events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == answer
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] in ("stop", "length")
    assert len({chunk["id"] for chunk in chunks}) == 1
    times = chunks[-1]["timings"]
    assert times["cache_n"] + times["prompt_n"] == usage["usage"]["prompt_tokens"]


def test_a_stream_without_usage_has_no_empty_choices(server: Server) -> None:
    events = server.chat(stream=True).events
    assert all(event["choices"] and "usage" not in event for event in events[:-1])


def test_a_schema_is_kept(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA, "name": "A", "strict": True}}
    text = server.chat(response_format=form, max_tokens=64).json["choices"][0]["message"]["content"]
    assert list(json.loads(text)) == ["a"]
    assert server.chat(response_format={"type": "text"}).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_function_is_called(server: Server, stream: bool) -> None:
    tools = [{"type": "function", "function": {"name": "A", "description": "", "parameters": SCHEMA}}]
    choice = {"type": "function", "function": {"name": "A"}}
    reply = server.chat(
        tools=tools, tool_choice=choice, parallel_tool_calls=False, stream=stream, max_tokens=64
    )
    if stream:
        calls = [c["choices"][0]["delta"]["tool_calls"][0] for c in reply.events[1:-2]]
        assert calls[0]["function"]["name"] == "A"
        arguments = "".join(call["function"]["arguments"] for call in calls)
    else:
        message = reply.json["choices"][0]["message"]
        assert message["content"] is None
        arguments = message["tool_calls"][0]["function"]["arguments"]
    assert list(json.loads(arguments)) == ["a"]


def test_logprobs(server: Server) -> None:
    reply = server.chat(logprobs=True, top_logprobs=2).json
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) == reply["usage"]["completion_tokens"]
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in content)


def test_a_picture_outlives_the_requests_between_its_questions(server: Server, answer: str) -> None:
    """Open WebUI asks for a title, tags and follow-ups after each answer."""
    turns = [{"role": "user", "content": parts()}, {"role": "assistant", "content": answer}]
    assert server.chat().status == 200
    for task in ("Give this chat a title.", "Give this chat tags."):
        assert server.chat(f"{task} <chat>{QUESTION} {answer}</chat>").status == 200
    follow_up = [*turns, {"role": "user", "content": "How many objects are there?"}]
    usage = server.chat(messages=follow_up).json["usage"]["prompt_tokens_details"]
    assert usage["cached_tokens"] >= usage["image_tokens"] == 36


def test_labels_and_memories_of_llm_vision(server: Server) -> None:
    """A text beside each picture, memories as a user message of their own, no key, another model's fields."""
    labeled = [{"type": "text", "text": "Image 1:"}, parts()[1], {"type": "text", "text": QUESTION}]
    turns = [
        {"role": "developer", "content": "You watch a camera."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Memory:"}, {"type": "input_image", "image_url": URI}],
        },
        {"role": "user", "content": labeled},
    ]
    reply = server.chat(messages=turns, max_completion_tokens=8, temperature=0.2, top_p=0.9).json
    assert reply["usage"]["prompt_tokens_details"]["image_tokens"] == 72
    assert reply["choices"][0]["message"]["content"]


def test_frigate_over_ollama(server: Server) -> None:
    options = {"temperature": 0.5, "repeat_penalty": 1.05, "presence_penalty": 0.3, "num_predict": 64}
    body = {
        "model": "llava",
        "prompt": QUESTION,
        "images": [BASE64] * 2,
        "options": options,
        "format": SCHEMA,
        "stream": False,
    }
    reply = server.post("/api/generate", body).json
    assert list(json.loads(reply["response"])) == ["a"]
    assert (reply["done"], reply["done_reason"]) == (True, "stop")


def test_fields_of_clients_that_change_nothing(server: Server, answer: str) -> None:
    fields = {
        "user": "x",
        "store": False,
        "metadata": {},
        "tools": [],
        "n": 1,
        "seed": -1,
        "stop": None,
        "frequency_penalty": 0,
    }
    assert server.chat(**fields).json["choices"][0]["message"]["content"] == answer


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "gpt-4o"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"content": "x"}]}, 400, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, 400, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://127.0.0.1/x.png"}]}]}, 400, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "/etc/passwd"}]}]}, 400, "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [parts()[1]] * 4}]}, 400, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "A"}}]}, 400, "tools"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, 400, "response_format"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(server: Server, fields: dict[str, Any], status: int, param: str) -> None:
    reply = server.chat(**fields)
    assert (reply.status, reply.json["error"]["param"]) == (status, param)
    assert reply.json["error"]["type"] == "invalid_request_error"


def test_a_conversation_that_does_not_fit(server: Server) -> None:
    error = server.chat("word " * 5000).json["error"]
    assert error["type"] == "exceed_context_size_error"
    assert error["code"] == "context_length_exceeded"
    assert error["n_ctx"] < error["n_prompt_tokens"]


def test_other_refusals(server: Server) -> None:
    assert server.post(CHAT, b"{").status == 400
    assert server.post(CHAT, b"[" * 100_000).status == 400
    assert server.get(CHAT).status == 405
    assert server.get("/v1/nothing").json["error"]["message"]
    assert server.get("/api/nothing").json["error"].startswith("/api/nothing")
    assert server.post(CHAT, b" " * (1 << 20) + b"{}").status == 413
    assert server.send("POST", CHAT, b"{}", content_type="text/plain").status == 415
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    assert server.chat(picture).status == 400
    assert "error" in server.chat(picture, stream=True).events[-1]


def test_nothing_of_a_request_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        server.chat("secret words", temperature=-1)
        server.chat("secret words", model="secret name")
        server.chat("secret words")
    assert "secret" not in caplog.text


def test_models_and_props(server: Server) -> None:
    (model,) = server.get("/v1/models").json["data"]
    assert model["id"] == "demo"
    assert "llava" in model["aliases"]
    assert model["architecture"]["input_modalities"] == ["text", "image"]
    assert model["meta"]["n_ctx"] == model["max_model_len"] == server.supervisor.n_ctx
    assert server.get("/models/llava").json == server.get("/v1/models/demo").json == model
    assert server.get("/v1/models/gpt-4o").status == 404
    assert server.get("/props").json["modalities"]["vision"] is True
    for path in ("/health", "/v1/health"):
        assert server.get(path).json == {"status": "ok", "queue": 0}
    assert server.get("/readyz").status == 200


def test_metrics_count(server: Server) -> None:
    def count() -> float:
        lines = server.get("/metrics").data.decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("pocketllava_answers_total"))

    before = count()
    server.chat()
    assert count() == before + 1


def test_the_page_and_its_headers(server: Server) -> None:
    page = server.get("/")
    assert page.data.startswith(b"<!doctype html>")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert server.get("/app.js").headers["content-type"].startswith("text/javascript")
    assert server.get("/", if_none_match=page.headers["etag"]).status == 304
    assert server.get("/../errors.py").status == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8080"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"host": "192.168.1.7"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost:1", "origin": "http://localhost:1"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "app://obsidian.md"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/api/tags", "/health"])
def test_host_and_origin(server: Server, headers: dict[str, str], status: int, path: str) -> None:
    reply = server.get(path, **headers)
    assert reply.status == status
    allowed = "app://obsidian.md" if headers.get("origin") == "app://obsidian.md" else None
    assert reply.headers.get("access-control-allow-origin") == allowed


def test_preflight(server: Server) -> None:
    assert server.send("OPTIONS", CHAT, origin="app://obsidian.md").status == 204
    assert server.send("OPTIONS", CHAT, origin="http://evil.example").status == 403


def test_the_key() -> None:
    for server in running(Access(key=KEY)):
        assert server.get("/v1/models").status == 401
        assert (
            server.get("/v1/models", authorization="Bearer wrong").json["error"]["code"] == "invalid_api_key"
        )
        assert isinstance(server.get("/api/tags").json["error"], str)
        assert server.get("/v1/models", authorization=f"Bearer {KEY}").status == 200
        for path in ("/", "/app.js", "/health", "/readyz"):
            assert server.get(path).status == 200


def long_request(server: Server, stream: bool) -> socket.socket:
    """A connection that has asked for a long answer."""
    turns = [{"role": "user", "content": "Tell me."}]
    form = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "minLength": 5000}}}
    fields = {
        "messages": turns,
        "max_tokens": 1900,
        "response_format": form,
        "temperature": 1.5,
        "stream": stream,
    }
    body = json.dumps(fields).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(server: Server, stream: bool, answer: str) -> None:
    connection = long_request(server, stream)
    server.until(lambda: server.supervisor.busy)
    connection.close()
    server.until(lambda: not server.supervisor.busy)
    assert server.chat().json["choices"][0]["message"]["content"] == answer


def test_a_cancelled_answer_ends_within_a_few_tokens(server: Server) -> None:
    async def late() -> list[Any]:
        options = Options(max_tokens=900, schema={"type": "string", "minLength": 900}, temperature=1.5)
        job = server.supervisor.answer([Message("user", "Tell me.")], options)
        while not isinstance(await job.next(), Chunk):
            pass
        server.supervisor.cancel(job)
        return [event async for event in job.events()]

    assert len(asyncio.run(late())) <= MAX_TOKENS_LATE


def test_an_engine_that_dies_is_started_again(answer: str) -> None:
    others = psutil.Process().children()
    for server in running(Access()):
        for deaths in (1, 2):
            (engine,) = set(psutil.Process().children()) - set(others)
            used_s = cpu_s(engine)
            with closing(long_request(server, False)) as connection:
                # a request that the engine has not begun is answered by the next one, and never hears of it
                server.until(lambda: cpu_s(engine) > used_s + 0.1)  # noqa: B023
                engine.kill()
                head = http.client.HTTPResponse(connection)
                head.begin()
            assert (head.status, head.headers["x-should-retry"]) == (503, "false")
            server.until(lambda: server.get("/health").status == 200)  # noqa: B023
            assert server.supervisor.restarts == deaths
            assert server.chat().json["choices"][0]["message"]["content"] == answer
        with closing(long_request(server, False)) as connection:
            head = http.client.HTTPResponse(connection)
            head.begin()
            assert json.loads(head.read())["error"]["code"] == "quarantined"


def test_a_full_queue(server: Server) -> None:
    connections = [long_request(server, True)]
    server.until(lambda: server.supervisor.busy)
    connections += [long_request(server, False) for _ in range(2)]
    server.until(lambda: server.supervisor.waiting == 2)
    reply = server.chat()
    for connection in connections[::-1]:
        connection.close()
    assert (reply.status, reply.json["error"]["code"]) == (429, "queue_full")
    assert int(reply.headers["retry-after"]) > 0
    server.until(lambda: not server.supervisor.busy and not server.supervisor.waiting, 2)


def test_slow_sockets_keep_nobody_waiting(server: Server, answer: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n".encode()
    with ExitStack() as stack:
        for n in range(200):
            slow = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            slow.sendall(head[: len(head) - n % 2 * 10] + b"{" * (1 - n % 2))
        start = time.monotonic()
        assert server.chat().json["choices"][0]["message"]["content"] == answer
        assert time.monotonic() - start < 2


def test_a_body_that_does_not_arrive() -> None:
    for server in running(Access(), Limits(body_s=0.2)):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
            slow.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{{".encode())
            assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_prepare_and_view(server: Server, answer: str) -> None:
    picture = [{"type": "image_url", "image_url": {"url": URI}}]
    reply = server.post("/v1/prepare", {"messages": [{"role": "user", "content": picture}]})
    assert reply.status == 202
    path = f"/v1/prepare/{reply.json['id']}"
    server.until(lambda: server.get(path).json["status"] == "done")
    told = server.chat().json
    assert told["choices"][0]["message"]["content"] == answer
    assert told["usage"]["prompt_tokens_details"]["cached_tokens"] >= 36
    assert server.get("/v1/prepare/none").status == 404
    view = server.post("/v1/view", {"image_url": URI})
    assert view.data.startswith(b"\x89PNG")
    assert view.headers["x-grid"] == "6x6"
    assert server.post("/v1/view", {"image_url": "x.png"}).status == 400


def test_ollama_lists(server: Server) -> None:
    assert server.get("/api/version").json["version"].count(".") == 2
    rows = server.get("/api/tags").json["models"]
    assert {"demo:latest", "llava:latest"} == {row["model"] for row in rows}
    assert server.get("/api/ps").json["models"][0]["name"] == "demo:latest"
    assert server.post("/api/show", {"name": "llava"}).json["capabilities"] == ["completion", "vision"]
    assert server.post("/api/pull", {"model": "llava"}).lines == [{"status": "success"}]
    reply = server.post("/api/pull", {"model": "llama3"})
    assert (reply.status, "not found" in reply.json["error"]) == (404, True)


def test_ollama_chat(server: Server, answer: str) -> None:
    turns = [{"role": "user", "content": QUESTION, "images": [BASE64]}]
    body = {
        "model": "llava",
        "messages": turns,
        "tools": [],
        "think": False,
        "keep_alive": -1.0,
        "options": {"num_predict": 16, "num_ctx": 8192},
    }
    *pieces, last = server.post("/api/chat", body).lines
    assert "".join(line["message"]["content"] for line in [*pieces, last]) == answer
    assert not any(line["done"] for line in pieces)
    assert last["done"] is True
    assert last["eval_count"] > 0
    assert last["total_duration"] > last["eval_duration"] >= 0
    assert server.post("/api/chat", body | {"stream": False}).json["message"]["content"] == answer
    assert "does not support tools" in server.post("/api/chat", body | {"tools": [{}]}).json["error"]
    assert "does not support thinking" in server.post("/api/chat", body | {"think": True}).json["error"]


def test_ollama_generate(server: Server, answer: str) -> None:
    body = {
        "model": "llava",
        "stream": False,
        "suffix": "",
        "options": {"temperature": 0, "num_predict": 16},
        "prompt": QUESTION,
        "images": [BASE64],
    }
    assert server.post("/api/generate", body).json["response"] == answer
    structured = body | {"format": SCHEMA, "options": {"num_predict": 64}}
    assert list(json.loads(server.post("/api/generate", structured).json["response"])) == ["a"]
    assert server.post("/api/generate", {"model": "llava"}).json["done_reason"] == "load"
    assert server.post("/api/generate", body | {"images": ["%"]}).status == 400


def test_an_idle_model_is_freed_and_loaded_again(answer: str) -> None:
    for server in running(Access(), idle_s=0.3):
        server.until(lambda: server.supervisor.state == "idle")  # noqa: B023
        assert server.get("/health").json["status"] == "idle"
        assert server.get("/v1/models").status == 200
        assert server.supervisor.state == "idle"
        assert server.chat().json["choices"][0]["message"]["content"] == answer


def test_the_command_prints_three_lines_and_ends(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(KEY + "\n")
    command = [
        sys.executable,
        "-m",
        "pocketllava",
        "serve",
        "demo",
        "--port",
        "0",
        "--api-key-file",
        str(key),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(3)]
        server = Server(int(lines[0].rsplit(":", 1)[1]), None)  # type: ignore[arg-type]
        server.until(lambda: server.get("/health").status == 200)  # it listens before the model is loaded
        assert server.get("/v1/models").status == 401
        child.terminate()
        child.wait(20)
    assert [line.split(":")[0] for line in lines] == ["page", "clients", "model"]
    assert f" on {machines.text_place()}" in lines[2]


def can_listen(host: str) -> bool:
    """Whether this machine has IPv6."""
    try:
        socket.create_server((host, 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "shown", "reached"),
    [("::1", "[::1]", ["::1"]), ("::", "localhost", ["::1", "127.0.0.1"])],
)
def test_ipv6(host: str, shown: str, reached: list[str], tmp_path: Path) -> None:
    if not can_listen(host):
        pytest.skip(f"this machine has no {host}")
    key = tmp_path / "key"
    key.write_text(KEY)
    options = ["--port", "0", "--host", host, "--api-key-file", str(key)]
    command = [sys.executable, "-m", "pocketllava", "serve", "demo", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        page, port = child.stdout.readline().strip().rsplit(":", 1)
        assert page == f"page: http://{shown}"
        for address in reached:
            with closing(http.client.HTTPConnection(address, int(port), timeout=60)) as connection:
                named = f"[{address}]" if ":" in address else address
                for origin, status in ((f"http://{named}:{port}", 200), ("http://[::2]", 403)):
                    connection.request("GET", "/v1/models", headers={"x-api-key": KEY, "origin": origin})
                    reply = connection.getresponse()
                    assert (reply.status, bool(reply.read())) == (status, True)
        child.terminate()


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--host", "0.0.0.0"], "--api-key-file"), (["--api-key-file", "none"], "cannot be read as an API key")],
)
def test_the_command_refuses(options: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, ["serve", "demo", *options])
    assert result.exit_code != 0
    assert words in f"{result.output}{result.exception}"

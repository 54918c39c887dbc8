"""The OpenAPI document is true: its routes are the server's, each documented status is sent, replies fit, and 300 bodies
that were generated from it end in no status that it does not have."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import albums
import jsonschema
import msgspec
import pytest
from attack import bodies
from starlette.routing import Route
from test_serve import BASE64, KEY, URI, Server, long_request, parts, running

from pocketllava.album.gallery import Gallery
from pocketllava.names import open_bundle
from pocketllava.serve import album, app, ollama, openai, page_files
from pocketllava.serve.document import ASKING, document
from pocketllava.serve.guard import Access
from pocketllava.serve.served import Limits, Served
from pocketllava.serve.supervisor import Supervisor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:llama_token_get_attr:DeprecationWarning"),
]

TURNS = [{"role": "user", "content": parts()}]
VALID: dict[str, dict[str, Any]] = {
    "ChatRequest": {"model": "llava", "messages": TURNS, "max_tokens": 4},
    "PrepareRequest": {"messages": TURNS},
    "ViewRequest": {"image_url": URI},
    "AlbumSearchRequest": {"image_url": URI},
    "OllamaNamed": {"model": "llava"},
    "OllamaChatRequest": {
        "model": "llava",
        "messages": [{"role": "user", "content": "x", "images": [BASE64]}],
    },
    "OllamaGenerateRequest": {"model": "llava", "prompt": "x", "images": [BASE64]},
}
STRUCTS = {
    "ChatRequest": openai.ChatRequest,
    "PrepareRequest": app.PrepareRequest,
    "ViewRequest": app.ViewRequest,
    "AlbumSearchRequest": album.SearchRequest,
    "OllamaNamed": ollama.Named,
    "OllamaChatRequest": ollama.ChatRequest,
    "OllamaGenerateRequest": ollama.GenerateRequest,
    "Message": openai.Turn,
    "OllamaMessage": ollama.Turn,
    "Named": openai.Named,
    "Tool": openai.Tool,
}
OPERATIONS = [
    (path, method, operation)
    for path, item in document()["paths"].items()
    for method, operation in item.items()
]


def body_of(operation: Any) -> str | None:
    """The name of an operation's body."""
    if "requestBody" not in operation:
        return None
    name: str = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return name.rpartition("/")[2]


def cases(*statuses: int) -> list[Any]:
    """(path, method, operation, status) of every operation that documents one of these."""
    return [
        pytest.param(path, method, operation, status, id=f"{method} {path} {status}")
        for path, method, operation in OPERATIONS
        for status in statuses
        if str(status) in operation["responses"]
    ]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Of one picture, which no request shows."""
    return Gallery(albums.album(tmp_path_factory.mktemp("album"), ("a scene",)))


@pytest.fixture(scope="module")
def server(gallery: Gallery) -> Iterator[Server]:
    """Small and impatient; one request may wait."""
    yield from running(Access(), Limits(body_bytes=1 << 20, body_s=0.2), gallery, queue=1)


@pytest.fixture(scope="module")
def keyed() -> Iterator[Server]:
    """With a key."""
    yield from running(Access(key=KEY))


@pytest.fixture(scope="module")
def closed(gallery: Gallery) -> Iterator[Server]:
    """Whose engine is gone for good."""
    for server in running(Access(), gallery=gallery):
        server.supervisor.close()
        yield server


def check(operation: Any, status: int, reply: Any) -> None:
    """Assert that a reply is what the document says."""
    assert reply.status == status, reply.data
    content = operation["responses"][str(status)]["content"]
    kind = reply.headers["content-type"].partition(";")[0]
    kind = kind if kind in content else f"{kind.partition('/')[0]}/*"
    assert kind in content
    if "schema" in content[kind]:
        jsonschema.validate(reply.json, {**content[kind]["schema"], "components": document()["components"]})


def ask(server: Server, path: str, method: str, operation: Any, **headers: str) -> Any:
    """A request that is right."""
    name = body_of(operation)
    known = "none" if "prepare" in path else "demo"
    return server.send(method.upper(), path.replace("{id}", known), VALID[name] if name else None, **headers)


def test_routes_are_documented() -> None:
    built = app.build(Supervisor(lambda: None), Served("demo", open_bundle("demo")), Access())  # type: ignore[arg-type,return-value]
    found = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in built.routes
        if isinstance(route, Route)
        for method in (route.methods or ()) - {"HEAD"}
    }
    files = {(path, "get") for path in page_files.PATHS if path != "/"}
    assert found - files == {(path, method) for path, method, _ in OPERATIONS}


@pytest.mark.parametrize("name", STRUCTS)
def test_every_field_is_documented(name: str) -> None:
    fields = {field.encode_name for field in msgspec.structs.fields(STRUCTS[name])}
    assert fields == set(document()["components"]["schemas"][name]["properties"])


def test_the_document_is_served_and_whole(server: Server) -> None:
    served = server.get("/openapi.json").json
    assert served == document()
    for schema in served["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    refs = {ref for ref in _refs(served) if not _found(served, ref)}
    assert not refs


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from _refs(part)
    elif isinstance(value, list):
        for part in value:
            yield from _refs(part)


def _found(served: Any, ref: str) -> bool:
    return ref.removeprefix("#/components/schemas/") in served["components"]["schemas"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "method", "operation", "status"), cases(200, 202))
def test_what_is_asked_rightly(
    server: Server, path: str, method: str, operation: Any, status: int, stream: bool
) -> None:
    server.until(lambda: not server.supervisor.busy and not server.supervisor.waiting)
    if path == "/v1/prepare/{id}":
        path = f"/v1/prepare/{server.post('/v1/prepare', VALID['PrepareRequest']).json['id']}"
    name = body_of(operation)
    streams = name is not None and "stream" in document()["components"]["schemas"][name]["properties"]
    body = None if name is None else {**VALID[name], **({"stream": stream} if streams else {})}
    known = "1" if path.startswith("/v1/album") else "demo"
    check(operation, status, server.send(method.upper(), path.replace("{id}", known), body))


@pytest.mark.parametrize(("path", "method", "operation", "status"), cases(400, 413, 415))
def test_bodies_that_are_none(server: Server, path: str, method: str, operation: Any, status: int) -> None:
    body = {400: b"{", 413: b" " * (1 << 20) + b"{}", 415: b"{}"}[status]
    kind = {"content_type": "text/plain"} if status == 415 else {}
    check(operation, status, server.send("POST", path, body, **kind))


@pytest.mark.parametrize(("path", "method", "operation", "status"), cases(403))
def test_other_hosts(server: Server, path: str, method: str, operation: Any, status: int) -> None:
    check(operation, status, ask(server, path, method, operation, host="evil.example"))


@pytest.mark.parametrize(("path", "method", "operation", "status"), cases(404))
def test_what_is_not_there(server: Server, path: str, method: str, operation: Any, status: int) -> None:
    name = body_of(operation)
    body = None if name is None else VALID[name] | {"model": "gpt-4o"}
    check(operation, status, server.send(method.upper(), path.replace("{id}", "none"), body))


@pytest.mark.parametrize(("path", "method", "operation", "status"), cases(408))
def test_bodies_that_do_not_arrive(
    server: Server, path: str, method: str, operation: Any, status: int
) -> None:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{{"
    with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as slow:
        slow.sendall(head.encode())
        reply = http.client.HTTPResponse(slow)
        reply.begin()
    assert reply.status == status


def test_a_full_queue(server: Server) -> None:
    with closing(long_request(server, True)):
        server.until(lambda: server.supervisor.busy)
        with closing(long_request(server, False)):
            server.until(lambda: server.supervisor.waiting == 1)
            for path, method, operation in OPERATIONS:
                if "429" in operation["responses"]:
                    check(operation, 429, ask(server, path, method, operation))
    server.until(lambda: not server.supervisor.busy and not server.supervisor.waiting, 5)


@pytest.mark.parametrize(("path", "method", "operation", "status"), cases(401))
def test_the_key(keyed: Server, path: str, method: str, operation: Any, status: int) -> None:
    check(operation, status, ask(keyed, path, method, operation))


def test_what_needs_no_key(keyed: Server) -> None:
    for path, method, operation in OPERATIONS:
        if operation.get("security") == []:
            assert ask(keyed, path, method, operation).status == 200


@pytest.mark.parametrize(("path", "method", "operation", "status"), cases(503))
def test_without_an_engine(closed: Server, path: str, method: str, operation: Any, status: int) -> None:
    check(operation, status, ask(closed, path, method, operation))


def test_every_documented_status_is_tested_here() -> None:
    tested = {200, 202, 400, 401, 403, 404, 408, 413, 415, 429, 503}
    assert {int(code) for _, _, operation in OPERATIONS for code in operation["responses"]} == tested
    assert set(ASKING) < tested


def test_generated_bodies(tmp_path: Path) -> None:
    counts = bodies.run(0, 300, tmp_path)
    assert counts.failures == []
    assert counts.cases == 300
    assert min(counts.accepted, counts.refused) >= 60

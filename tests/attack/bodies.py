"""Attacks the server with generated bodies: drawn from its own OpenAPI document, half of them then damaged.

python tests/attack/bodies.py [SEED [CASES]]

Each goes to a real `pocketllava serve demo` on loopback. Wrong are a status that the document does not have for the
route, a 5xx but 503, a stream that ends without its end, and a reply that is not of its schema; crashes are deaths of
the engine or the server.
"""

from __future__ import annotations

import base64
import json
import random
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import json_schemas
import jsonschema
from albums import album
from pictures import png, scene
from serving import QUESTION, SCENE, serving

if __name__ == "__main__":
    from counts import Counts
else:
    from attack.counts import Counts

HANG_S = 60.0  # for one reply
MAX_TOKENS = 8  # nearly always: answers are not what is attacked
OFTEN = 0.97
MODELS = ["demo", "llava", "llava:latest"]
BYTES = [SCENE.read_bytes(), png(scene(40, 30)), b"\xff\xd8\xff\xe0", b"GIF89a", b"", b"not an image"]
BASE64 = [base64.b64encode(data).decode() for data in BYTES]
URIS = [f"data:image/png;base64,{data}" for data in BASE64]
ELSEWHERE = [
    "http://127.0.0.1:1/x.png",
    "file:///etc/passwd",
    "data:,",
    "data:image/png;base64",
    "/etc/passwd",
]
TEXTS = [
    "",
    " ",
    QUESTION,
    "Hello.",
    "<image>",
    "</s>",
    "\0",
    "\ud800",
    "é" * 300,
    "ASSISTANT:",
    "1",
    "null",
    "{}",
]
JUNK: list[Any] = [
    None, True, False, 0, -1, 1e308, -1e308, 2**31, 2**63, 2**64, -(2**63) - 1, 0.1, "", "x" * 5000, "\ud800", "\0",
    [], {}, [[]], [None], {"": None}, {"type": "object", "properties": 1}, {"$ref": "#"}, float("nan"), float("inf"),
]  # fmt: skip


class Bodies:
    """Draws bodies of a document's request schemas."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.schemas = document["components"]["schemas"]
        self.routes = [
            (path, operation["requestBody"]["content"]["application/json"]["schema"])
            for path, item in document["paths"].items()
            for operation in item.values()
            if "requestBody" in operation
        ]

    def case(self, rng: random.Random) -> tuple[str, bytes]:
        """(path, body)."""
        path, schema = rng.choice(self.routes)
        body = self._limited(path, self.value(schema, rng), rng)
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 5))):
            body = damaged(body, rng)
        data = json.dumps(body).encode()
        if rng.random() < 0.03:
            at = rng.randrange(len(data))
            data = (
                data[:at]
                + rng.choice((b"", b"\xff", b"[" * 5000, b"}", b'"'))
                + data[at + rng.randrange(3) :]
            )
        return path, data

    def value(self, schema: dict[str, Any], rng: random.Random) -> Any:
        """One value that fits."""
        if "$ref" in schema:
            return self._named(schema["$ref"].rpartition("/")[2], rng)
        if "anyOf" in schema:
            return self.value(rng.choice(schema["anyOf"]), rng)
        for keyword in ("enum", "const"):
            if keyword in schema:
                return rng.choice(schema["enum"]) if keyword == "enum" else schema["const"]
        kinds = schema.get("type", "null")
        return self._typed(kinds if isinstance(kinds, str) else rng.choice(kinds), schema, rng)

    def _named(self, name: str, rng: random.Random) -> Any:
        if name == "JsonSchema":
            return json_schemas.schema(rng)
        if name == "DataUri":
            return rng.choice(URIS[:2] if rng.random() < 0.7 else URIS + ELSEWHERE)
        if name == "Base64":
            return rng.choice(BASE64[:2] if rng.random() < 0.7 else [*BASE64, "%", "====", URIS[0]])
        return self.value(self.schemas[name], rng)

    def _typed(self, kind: str, schema: dict[str, Any], rng: random.Random) -> Any:
        if kind == "object":
            share, required = rng.choice((0.1, 0.3, 0.8)), schema.get("required", ())
            return {
                name: self.value(part, rng)
                for name, part in schema.get("properties", {}).items()
                if name in required or rng.random() < share
            }
        if kind == "array":
            low, high = schema.get("minItems", 0), schema.get("maxItems", 4)
            return [self.value(schema["items"], rng) for _ in range(rng.randint(low, max(low, min(high, 4))))]
        if kind in ("integer", "number"):
            low = schema.get("minimum", schema.get("exclusiveMinimum", -5) + 1e-3)
            high = min(schema.get("maximum", 100), rng.choice((1, 10, 1e10)))
            drawn = rng.uniform(low, max(low, high))
            return max(round(drawn), round(low)) if kind == "integer" else drawn
        return {
            "boolean": rng.random() < 0.5,
            "string": rng.choice(TEXTS[:4] if rng.random() < 0.8 else TEXTS),
        }.get(kind)

    def _limited(self, path: str, body: Any, rng: random.Random) -> Any:
        """Nearly always the same with what a schema cannot say: a name that is served, few tokens, whose images."""
        if rng.random() > OFTEN:
            return body
        if "model" in body or path.startswith("/api/"):
            body["model"] = rng.choice(MODELS)
        if path.startswith("/api/"):
            body["options"] = {**(body.get("options") or {}), "num_predict": rng.randint(1, MAX_TOKENS)}
        else:
            body["max_tokens"] = rng.randint(1, MAX_TOKENS)
        if turns := body.get("messages"):
            turns[-1]["role"] = "user"
            for turn in turns:
                if turn["role"] != "user":
                    turn |= {"content": rng.choice(TEXTS[2:4]), "images": None}
            if path == "/v1/prepare":
                turns[-1]["content"] = [{"type": "input_image", "image_url": rng.choice(URIS[:2])}]
        return body


def damaged(body: Any, rng: random.Random) -> Any:
    """A copy with one place replaced, removed or added."""
    body = json.loads(json.dumps(body))
    places = list(_places(body))
    if not places:
        return rng.choice(JUNK)
    owner, key = rng.choice(places)
    if rng.random() < 0.2 and isinstance(owner, dict):
        owner[rng.choice((*TEXTS, *owner))] = rng.choice(JUNK)
    elif rng.random() < 0.2:
        del owner[key]
    else:
        owner[key] = rng.choice(JUNK)
    return body


def _places(value: Any) -> Any:
    """(container, key) of every value inside."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield value, key
        yield from _places(part)


class Judge:
    """Sends cases to a server, and counts how they end."""

    def __init__(self, address: str, document: dict[str, Any], counts: Counts) -> None:
        self._address, self._document, self._counts = address, document, counts
        self._validators: dict[str, Any] = {}

    def send(self, name: str, path: str, data: bytes) -> None:
        """One case."""
        counts = self._counts
        counts.cases += 1
        try:
            status, kind, body = post(self._address + path, data)
        except TimeoutError:
            counts.hangs += 1
            self._fail(name, path, data, f"no reply in {HANG_S:g} s")
            return
        except OSError as error:
            counts.crashes += 1
            self._fail(name, path, data, f"no reply ({error})")
            return
        counts.accepted += status < 400
        counts.refused += 400 <= status < 500
        if wrong := self._wrong(path, status, kind, body):
            counts.wrong += 1
            self._fail(name, path, data, wrong)

    def _wrong(self, path: str, status: int, kind: str, body: bytes) -> str | None:
        """What is wrong with a reply."""
        responses = self._document["paths"][path]["post"]["responses"]
        if status >= 500 or str(status) not in responses:
            return f"status {status}: {body[:300]!r}"
        content = responses[str(status)]["content"]
        if kind not in content:
            return f"content type {kind}, expected one of {', '.join(content)}"
        if kind == "text/event-stream":
            return _wrong_events(body)
        if kind == "image/png":
            return None if body.startswith(b"\x89PNG") else "no PNG file"
        rows = (
            [json.loads(line) for line in body.splitlines()]
            if kind.endswith("ndjson")
            else [json.loads(body)]
        )
        if not rows or (kind.endswith("ndjson") and not rows[-1].keys() & {"done", "error", "status"}):
            return f"no end: {body[-300:]!r}"
        return self._misshaped(content[kind].get("schema"), rows[-1])

    def _misshaped(self, schema: dict[str, Any] | None, reply: Any) -> str | None:
        if schema is None:
            return None
        name = schema["$ref"]
        if name not in self._validators:
            components = self._document["components"]
            self._validators[name] = jsonschema.Draft202012Validator({**schema, "components": components})
        error = next(self._validators[name].iter_errors(reply), None)
        return f"reply is not of {name}: {error.message[:300]}" if error else None

    def _fail(self, name: str, path: str, data: bytes, what: str) -> None:
        self._counts.failures.append(f"{name}: POST {path}: {what}: {data[:600]!r}")


def _wrong_events(body: bytes) -> str | None:
    lines = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
    if lines and lines[-1] == "[DONE]":
        return None
    error = json.loads(lines[-1]).get("error") if lines else None
    if error is None:
        return f"a stream without its end: {body[-300:]!r}"
    return f"error {error['status']} in a stream: {error['message']}" if error["status"] >= 500 else None


def post(url: str, data: bytes) -> tuple[int, str, bytes]:
    """(status, content type, body)."""
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=HANG_S) as reply:
            return reply.status, reply.headers.get_content_type(), reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers.get_content_type(), error.read()
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else OSError(str(error)) from error


def run(seed: int, cases: int, folder: Path) -> Counts:
    """Every case of a seed; then the engine must be the one that was started, and its answer the right one."""
    counts = Counts()
    with tempfile.TemporaryDirectory() as place, serving("--album", str(_album(Path(place)))) as address:
        document = json.loads(urllib.request.urlopen(f"{address}/openapi.json", timeout=HANG_S).read())
        bodies, judge = Bodies(document), Judge(address, document, counts)
        for n in range(seed * 1_000_000, seed * 1_000_000 + cases):
            judge.send(f"seed {n}", *bodies.case(random.Random(n)))
        _survived(address, counts)
    return counts


def _album(folder: Path) -> Path:
    """What searches look into."""
    return album(folder, ("Hello.", "1", "null", "a red square", f"{QUESTION} é"))


def _survived(address: str, counts: Counts) -> None:
    try:
        metrics = urllib.request.urlopen(f"{address}/metrics", timeout=HANG_S).read().decode()
    except OSError as error:
        counts.crashes += 1
        counts.failures.append(f"server: it does not answer any more ({error})")
        return
    if "pocketllava_engine_restarts_total 0.0" not in metrics:
        counts.crashes += 1
        counts.failures.append("engine: it ended during these cases")
    turns = [
        {
            "role": "user",
            "content": [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": URIS[0]}],
        }
    ]
    _, _, body = post(f"{address}/v1/chat/completions", json.dumps({"messages": turns}).encode())
    if (said := json.loads(body)["choices"][0]["message"]["content"]) != "a blue square":
        counts.wrong += 1
        counts.failures.append(f"last answer: found {said!r}")


if __name__ == "__main__":
    arguments = [int(a) for a in sys.argv[1:]] + [0, 5000][len(sys.argv) - 1 :]
    found = run(arguments[0], arguments[1], Path())
    print(found.cases, "cases", {k: v for k, v in vars(found).items() if k not in ("cases", "failures")})
    print("\n".join(found.failures))
    sys.exit(bool(found.failures))

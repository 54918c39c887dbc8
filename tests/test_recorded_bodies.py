"""Requests of real programs, recorded in tests/recorded/clients/, sent to `pocketllava serve demo` in their order.

Each file is one program. "@png" and "@jpeg" stand for the picture in base64, "@png-uri" and "@jpeg-uri" for its data
URI, "@question" for its question. A reply must have a status (200), a text ("@answer" is what Llava says, "@any" some),
JSON with certain keys, and the fields that the program reads.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import QUESTION, SCENE, SECOND, serving

from pocketllava import Llava, Message

FOLDER = Path(__file__).parent / "recorded" / "clients"
ANY = "@any"


def base64_of(kind: str) -> str:
    """The picture in a file of that kind."""
    file = io.BytesIO()
    Image.open(SCENE).convert("RGB").save(file, kind, **({"quality": 95} if kind == "jpeg" else {}))
    return base64.b64encode(file.getvalue()).decode()


PICTURES = {f"@{kind}": base64_of(kind) for kind in ("png", "jpeg")}
URIS = {f"{name}-uri": f"data:image/{name[1:]};base64,{data}" for name, data in PICTURES.items()}
STANDS_FOR = {**PICTURES, **URIS, "@question": QUESTION}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The server's."""
    with serving("--origin", "app://obsidian.md") as address:
        yield address


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """What Llava says to the question about the picture, and to the second one after it."""
    with Llava.load("demo") as llava:
        turns = [Message("user", QUESTION, SCENE)]
        first = llava.chat(turns).text
        turns += [Message("assistant", first), Message("user", SECOND)]
        return {"@answer": first, "@second": llava.chat(turns).text}


def filled(value: Any) -> Any:
    """A recorded value with its pictures."""
    if isinstance(value, dict):
        return {key: filled(part) for key, part in value.items()}
    if isinstance(value, list):
        return [filled(part) for part in value]
    return STANDS_FOR.get(value, value) if isinstance(value, str) else value


def send(address: str, recorded: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one reply."""
    method, path = recorded["do"].split(" ", 1)
    data = json.dumps(filled(recorded["body"])).encode() if "body" in recorded else None
    headers = {**({"content-type": "application/json"} if data else {}), **recorded.get("headers", {})}
    request = urllib.request.Request(address + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {}, error.read()


def read(kind: str, body: bytes) -> tuple[Any, str]:
    """(fields, text) of a reply as programs read it; of a stream's events, each field as it was last seen."""
    if kind.startswith("text/event-stream"):
        lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        choices = [choice for event in events for choice in event["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        fields = {"finish_reason": choices[-1]["finish_reason"]}
        for event in events:
            fields |= {key: value for key, value in event.items() if value is not None}
        return fields, text
    rows = [json.loads(line) for line in body.splitlines()] if "ndjson" in kind else [json.loads(body)]
    return rows[-1], "".join(map(text_of, rows))


def text_of(row: Any) -> str:
    """The text in one object of either API."""
    if "choices" in row:
        return row["choices"][0]["message"]["content"] or ""
    return row.get("response") or row.get("message", {}).get("content") or ""


def field(value: Any, path: str) -> Any:
    """A field by its path; names in model_info have dots themselves."""
    while path:
        name, _, rest = path.partition(".")
        if isinstance(value, dict) and path in value:
            return value[path]
        value, path = value[int(name) if isinstance(value, list) else name], rest
    return value


def check(
    recorded: dict[str, Any], reply: tuple[int, dict[str, str], bytes], answers: dict[str, str]
) -> None:
    """Assert what the program relies on."""
    status, headers, body = reply
    assert status == recorded.get("status", 200), body
    for name, expected in recorded.get("replies", {}).items():
        assert headers[name] == expected
    if not recorded.keys() & {"text", "json", "has", "at_least"}:
        return
    fields, text = read(headers.get("content-type", ""), body)
    if "text" in recorded:
        assert text.strip() if recorded["text"] == ANY else text == answers[recorded["text"]]
    if (
        "json" in recorded and fields.get("done_reason") == "length"
    ):  # sampled with no seed: it may fill the context
        assert text.startswith("{")
    elif "json" in recorded:
        assert set(json.loads(text)) >= set(recorded["json"])
    for path, expected in recorded.get("has", {}).items():
        found = field(fields, path)
        assert found is not None if expected == ANY else found == expected, path
    for path, least in recorded.get("at_least", {}).items():
        assert field(fields, path) >= least


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_a_program_gets_what_it_reads(name: str, address: str, answers: dict[str, str]) -> None:
    recorded = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    for request in recorded["requests"]:
        check(request, send(address, request), answers)

"""Ollama's routes: what Home Assistant, Frigate, PhotoPrism and Open WebUI ask. Nothing is downloaded over them.

Knows the API's fields and its quirks: streams by default, durations in nanoseconds, pictures in bare base64.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pocketllava.serve.faults import Fault, fault_of, invalid
from pocketllava.serve.openai import ANY_OBJECT, ROLES, sampled
from pocketllava.serve.served import LATEST, Served
from pocketllava.serve.status import Metrics
from pocketllava.serve.supervisor import Job, Supervisor, whole
from pocketllava.serve.transport import Pieces, attended, counted, digest, encoded, parsed, read_body
from pocketllava.types import MAX_INT, Chunk, Message, Options, Timings

VERSION = "0.12.0"  # of the API that is answered
LINES = "application/x-ndjson"
NANO = 1_000_000_000
FOR_EVER = timedelta(days=106_751)  # Ollama's own: 2^63 nanoseconds
Format = str | dict[str, Any] | None


class Turn(msgspec.Struct):
    """A message, its pictures beside it."""

    role: str = "user"
    content: str | None = ""
    images: list[str] | None = None


class Asked(msgspec.Struct):
    """What chat and generate share."""

    model: str | None = None
    stream: bool | None = True
    format: Format = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None
    think: bool | str | None = None


class ChatRequest(Asked):
    """POST /api/chat."""

    messages: list[Turn] | None = None
    tools: list[Any] | None = None


class GenerateRequest(Asked):
    """POST /api/generate."""

    prompt: str | None = ""
    system: str | None = ""
    images: list[str] | None = None
    suffix: str | None = ""
    template: str | None = ""
    raw: bool | None = False
    context: list[int] | None = None


class Named(msgspec.Struct):
    """A model's name, under both of its names."""

    model: str | None = None
    name: str | None = None
    stream: bool | None = True


class Ollama:
    """The routes."""

    def __init__(self, supervisor: Supervisor, served: Served, metrics: Metrics) -> None:
        self._supervisor, self._served, self._metrics = supervisor, served, metrics

    def routes(self) -> list[Route]:
        """Every route under /api."""
        return [
            Route("/api/version", self.version, methods=["GET"]),
            Route("/api/tags", self.tags, methods=["GET"]),
            Route("/api/ps", self.ps, methods=["GET"]),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/api/pull", self.pull, methods=["POST"]),
            Route("/api/chat", self.chat, methods=["POST"]),
            Route("/api/generate", self.generate, methods=["POST"]),
        ]

    async def version(self, _: Request) -> Response:
        """GET /api/version."""
        return JSONResponse({"version": VERSION})

    async def tags(self, _: Request) -> Response:
        """GET /api/tags: the model under each of its names, for clients that look theirs up."""
        return JSONResponse({"models": [self._row(name) for name in self._names()]})

    async def ps(self, _: Request) -> Response:
        """GET /api/ps: the model while it is in memory."""
        if self._supervisor.state != "ok":
            return JSONResponse({"models": []})
        now, frees_at = datetime.now(timezone.utc), self._supervisor.frees_at
        expires = datetime.fromtimestamp(frees_at, timezone.utc) if frees_at else now + FOR_EVER
        row = self._row(self._names()[0]) | {"expires_at": expires.isoformat(), "size_vram": 0}
        return JSONResponse({"models": [row]})

    async def show(self, request: Request) -> Response:
        """POST /api/show."""
        await self._named(request)
        facts = self._served.facts
        info = {
            "general.architecture": "llama",
            "general.parameter_count": facts["n_params"],
            "llama.context_length": self._supervisor.n_ctx or self._served.n_ctx,
            "llama.embedding_length": facts["n_embd"],
        }
        return JSONResponse(
            {
                "modelfile": "",
                "parameters": "",
                "template": "",
                "details": self._details(),
                "model_info": info,
                "capabilities": ["completion", "vision"],
                "modified_at": self._modified(),
            }
        )

    async def pull(self, request: Request) -> Response:
        """POST /api/pull: a name that is served is there already; no other is fetched."""
        asked = await self._named(request)
        status = {"status": "success"}
        if asked.stream is False:
            return JSONResponse(status)
        return Response(encoded(status) + b"\n", headers={"content-type": LINES})

    async def chat(self, request: Request) -> Response:
        """POST /api/chat."""
        body = await read_body(request, self._served.limits)
        asked = parsed(body, ChatRequest)
        self._check(asked)
        if asked.tools:
            raise invalid(f"{asked.model or self._served.name} does not support tools")
        if not asked.messages:
            return self._loaded(asked, is_chat=True)
        turns = [_message(turn, index) for index, turn in enumerate(asked.messages)]
        if turns[-1].role != "user":
            raise invalid("messages: expected the last one to be the user's")
        return await self._answer(request, asked, turns, body, is_chat=True)

    async def generate(self, request: Request) -> Response:
        """POST /api/generate."""
        body = await read_body(request, self._served.limits)
        asked = parsed(body, GenerateRequest)
        self._check(asked)
        for name in ("suffix", "template", "raw", "context"):
            if getattr(asked, name):
                raise invalid(f"{name}: not supported here")
        if not asked.prompt and not asked.images:
            return self._loaded(asked, is_chat=False)
        turns = [Message("system", asked.system)] if asked.system else []
        turns.append(Message("user", asked.prompt or "", _pictures(asked.images, "images")))
        return await self._answer(request, asked, turns, body, is_chat=False)

    async def _answer(
        self, request: Request, asked: Asked, messages: list[Message], body: bytes, *, is_chat: bool
    ) -> Response:
        counted(sum(len(message.images) for message in messages), self._served.limits)
        name = asked.model or self._served.name
        job = self._supervisor.answer(messages, _options(asked), digest(body))
        if asked.stream is not False:
            lines = self._lines(job, name, is_chat)
            return Pieces(lines, LINES, self._supervisor, job, self._served.limits.send_s)
        async with attended(request.receive, self._supervisor, job):
            chunks = await whole(job)
        self._metrics.note(chunks[-1].timings, job.queue_s)
        text = "".join(chunk.text for chunk in chunks)
        return JSONResponse(_line(name, text, is_chat) | _end(chunks[-1], job))

    async def _lines(self, job: Job, name: str, is_chat: bool) -> AsyncIterator[bytes]:
        try:
            async for event in job.events():
                if not isinstance(event, Chunk):
                    continue
                if event.text and event.finish_reason is None:
                    yield encoded(_line(name, event.text, is_chat) | {"done": False}) + b"\n"
                elif event.finish_reason is not None:
                    self._metrics.note(event.timings, job.queue_s)
                    yield encoded(_line(name, event.text, is_chat) | _end(event, job)) + b"\n"
        except Exception as error:
            yield encoded(fault_of(error).body(ollama=True)) + b"\n"

    def _loaded(self, asked: Asked, *, is_chat: bool) -> Response:
        """An empty question loads the model, or frees it with keep_alive 0."""
        reason = "load"
        if asked.keep_alive in (0, "0", "0s"):
            self._supervisor.unload()
            reason = "unload"
        else:
            self._supervisor.wake()
        line = _line(asked.model or self._served.name, "", is_chat) | {"done": True, "done_reason": reason}
        return Response(encoded(line) + b"\n", headers={"content-type": LINES})

    def _check(self, asked: Asked) -> None:
        """Raises Fault."""
        self._known(asked.model)
        if asked.think:
            raise invalid(f'"{asked.model or self._served.name}" does not support thinking')

    async def _named(self, request: Request) -> Named:
        asked = parsed(await read_body(request, self._served.limits), Named)
        self._known(asked.model or asked.name)
        return asked

    def _known(self, model: str | None) -> None:
        """Raises Fault in Ollama's words, with what is served."""
        if not model or not self._served.knows(model):
            names = ", ".join(self._names())
            raise Fault(404, f"model '{(model or '')[:80]}' not found; available: {names}")

    def _names(self) -> list[str]:
        names = (self._served.name, *self._served.aliases)
        return list(dict.fromkeys(name if ":" in name else name + LATEST for name in names))

    def _row(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "model": name,
            "modified_at": self._modified(),
            "size": self._served.facts["size"],
            "digest": self._served.sha256,
            "details": self._details(),
        }

    def _details(self) -> dict[str, Any]:
        facts = self._served.facts
        return {
            "parent_model": "",
            "format": "gguf",
            "family": "llama",
            "families": ["llama", "clip"],
            "parameter_size": _billions(facts["n_params"]),
            "quantization_level": facts["ftype"],
        }

    def _modified(self) -> str:
        return datetime.fromtimestamp(self._served.created, timezone.utc).isoformat()


def _message(turn: Turn, index: int) -> Message:
    role = ROLES.get(turn.role)
    if role is None:
        raise invalid(
            f"messages[{index}]: found the role {turn.role[:40]!r}, expected system, user or assistant"
        )
    return Message(role, turn.content or "", _pictures(turn.images, f"messages[{index}].images"))


def _pictures(images: list[str] | None, place: str) -> list[bytes]:
    """Bare base64 -> files' bytes. Raises Fault."""
    try:
        return [base64.b64decode(image, validate=True) for image in images or ()]
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{place}: not base64 ({error})") from None


def _options(asked: Asked) -> Options:
    """Ollama's names -> ours. Others, num_ctx included, change nothing here. Raises Fault, InputError."""
    options = asked.options or {}
    given = sampled(options)
    limit = options.get(
        "num_predict", -1 if asked.format else None
    )  # a record ends by itself, where there is room
    if limit is not None:
        given["max_tokens"] = MAX_INT if isinstance(limit, int) and limit < 0 else limit
    if stop := options.get("stop"):
        given["stop"] = stop
    if asked.format:
        if isinstance(asked.format, str) and asked.format != "json":
            raise invalid(f"format: found {asked.format[:40]!r}, expected json or a JSON schema")
        given["schema"] = ANY_OBJECT if isinstance(asked.format, str) else asked.format
    return Options(**given)


def _line(name: str, text: str, is_chat: bool) -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
    content = {"message": {"role": "assistant", "content": text}} if is_chat else {"response": text}
    return {"model": name, "created_at": now, **content}


def _end(chunk: Chunk, job: Job) -> dict[str, Any]:
    """The last line's fields."""
    t = chunk.timings or Timings()
    durations = {
        "total_duration": time.perf_counter() - job.created,
        "load_duration": 0.0,
        "prompt_eval_duration": t.preprocess_s + t.encode_s + t.prompt_s,
        "eval_duration": t.decode_s,
    }
    counts = {"prompt_eval_count": t.prompt_tokens, "eval_count": t.answer_tokens}
    nanoseconds = {name: int(seconds * NANO) for name, seconds in durations.items()}
    return {"done": True, "done_reason": chunk.finish_reason, **counts, **nanoseconds}


def _billions(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"

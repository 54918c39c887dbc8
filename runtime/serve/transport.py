"""Requests read within limits, clients that leave, and answers written piece by piece. Knows ASGI; no API."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from pocketllava.serve.faults import Fault, invalid
from pocketllava.serve.served import Limits
from pocketllava.serve.supervisor import Job, Supervisor

T = TypeVar("T")
JSON_TYPES = ("", "application/json")
CURL_TYPE = "application/x-www-form-urlencoded"  # what curl -d sends, as in Ollama's own examples


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises Fault: too large, too slow, not said to be JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in JSON_TYPES and not (kind == CURL_TYPE and request.url.path.startswith("/api/")):
        raise Fault(415, f"content-type: found {kind}, expected application/json")
    too_large = Fault(413, f"request: larger than {limits.body_bytes >> 20} MiB", code="request_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limits.body_bytes:
        raise too_large
    body = bytearray()

    async def read() -> None:
        async for piece in request.stream():
            body.extend(piece)
            if len(body) > limits.body_bytes:
                raise too_large

    try:
        await asyncio.wait_for(read(), limits.body_s)
    except asyncio.TimeoutError:
        raise Fault(
            408, f"request: not whole after {limits.body_s:g} s", headers={"connection": "close"}
        ) from None
    return bytes(body)


def parsed(body: bytes, kind: type[T]) -> T:
    """A body as a struct. Raises Fault that names the field by its path."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        field = path.rstrip("`").removeprefix("$").removeprefix(".") or None
        raise invalid(f"{field or 'request'}: {message}", field) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise invalid(f"request: not JSON ({error})") from None


def digest(body: bytes) -> str:
    """What tells a request from any other."""
    return hashlib.sha256(body).hexdigest()


@contextlib.asynccontextmanager
async def attended(receive: Receive, supervisor: Supervisor, job: Job) -> AsyncIterator[None]:
    """Cancels the job when its client leaves, or the block ends.

    Servers tell a handler by its own receive() alone, and streaming responses differ by ASGI version.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        supervisor.cancel(job)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        supervisor.cancel(job)


class Pieces(Response):
    """A response that is sent as its pieces come. A client that takes none for a while is left."""

    def __init__(
        self, pieces: AsyncIterator[bytes], media_type: str, supervisor: Supervisor, job: Job, send_s: float
    ) -> None:
        super().__init__(None, headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = media_type
        self._pieces, self._supervisor, self._job, self._send_s = pieces, supervisor, job, send_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send head and pieces; the job ends with the connection."""

        async def timely(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), self._send_s)

        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        with contextlib.suppress(asyncio.TimeoutError, OSError):
            async with attended(receive, self._supervisor, self._job):
                await timely(head)
                async for piece in self._pieces:
                    await timely({"type": "http.response.body", "body": piece, "more_body": True})
                await timely({"type": "http.response.body", "body": b"", "more_body": False})


def encoded(value: Any) -> bytes:
    """JSON, as compact as it can be."""
    return msgspec.json.encode(value)


def refusal(fault: Fault, path: str) -> JSONResponse:
    """An error in the form of the API whose path was asked for."""
    body = fault.body(ollama=path.startswith("/api/"))
    return JSONResponse(body, fault.status, headers=fault.headers)


def per_second(n: int, seconds: float) -> float:
    """n a second, 0 for no time."""
    return round(n / seconds, 2) if seconds > 0 else 0.0


def in_ms(seconds: float) -> float:
    """Milliseconds, to the microsecond."""
    return round(seconds * 1000, 3)


def counted(images: int, limits: Limits) -> None:
    """Raises Fault for more images than a request may show."""
    if images > limits.images:
        raise invalid(f"messages: found {images} images, expected at most {limits.images}", "messages")

"""Routes of the server, over one Supervisor. What a route answers is the business of openai, ollama and status."""

from __future__ import annotations

import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from msgspec import Struct
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pocketllava.album.gallery import Gallery
from pocketllava.errors import PocketLlavaError
from pocketllava.llava import Llava
from pocketllava.serve import openai, page_files, status
from pocketllava.serve.album import AlbumRoutes
from pocketllava.serve.document import document
from pocketllava.serve.faults import Fault, fault_of
from pocketllava.serve.guard import Access, Guard, open_paths
from pocketllava.serve.ollama import Ollama
from pocketllava.serve.prepare import Preparations
from pocketllava.serve.served import Served
from pocketllava.serve.supervisor import Job, Supervisor, whole
from pocketllava.serve.transport import Pieces, attended, digest, parsed, read_body, refusal
from pocketllava.types import Chunk

KEEP_ALIVE_S = 5.0  # between comments in a stream that has nothing to say
PROGRESS_S = 0.25  # between two pieces of news about the same stage
EVENTS = "text/event-stream"
Handler = Callable[[Request], Awaitable[Response]]


class PrepareRequest(Struct):
    """POST /v1/prepare."""

    messages: list[openai.Turn]


class ViewRequest(Struct):
    """POST /v1/view."""

    image_url: str


def build(
    supervisor: Supervisor, served: Served, access: Access, gallery: Gallery | None = None
) -> Starlette:
    """The application. It starts the supervisor, and closes it in the end. gallery: what the page shows beside."""
    routes = Routes(supervisor, served)

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        supervisor.start()
        try:
            yield
        finally:
            supervisor.close()

    access = replace(access, open_paths=open_paths(page_files.PATHS))
    ollama = Ollama(supervisor, served, routes.metrics)
    album = AlbumRoutes(gallery, supervisor, served)
    return Starlette(
        routes=[*routes.all(), *album.all(), *ollama.routes(), *page_files.routes()],
        middleware=[Middleware(Guard, access=access)],
        exception_handlers={PocketLlavaError: _refuse, Fault: _refuse, HTTPException: _refuse_http},
        lifespan=life,
    )


class Routes:
    """OpenAI's routes, the status and ours."""

    def __init__(self, supervisor: Supervisor, served: Served) -> None:
        self._supervisor, self._served = supervisor, served
        self._preparations = Preparations(supervisor)
        self.metrics = status.Metrics(supervisor)

    def all(self) -> list[Route]:
        """Every route; OpenAI's also without /v1, for clients whose base address has none."""
        both: list[tuple[str, Handler, str]] = [
            ("/chat/completions", self.chat, "POST"),
            ("/models", self.models, "GET"),
            ("/models/{id:path}", self.model, "GET"),
            ("/health", self.health, "GET"),
        ]
        own: list[tuple[str, Handler, str]] = [
            ("/readyz", self.readyz, "GET"),
            ("/props", self.props, "GET"),
            ("/metrics", self.show_metrics, "GET"),
            ("/openapi.json", self.openapi, "GET"),
            ("/v1/prepare", self.prepare, "POST"),
            ("/v1/prepare/{id}", self.preparation, "GET"),
            ("/v1/view", self.view, "POST"),
        ]
        paths = [(f"{base}{path}", handler, method) for path, handler, method in both for base in ("", "/v1")]
        return [Route(path, handler, methods=[method]) for path, handler, method in [*paths, *own]]

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await read_body(request, self._served.limits)
        asked = parsed(body, openai.ChatRequest)
        self._served.check(asked.model)
        messages = openai.messages_of(asked.messages, self._served.limits)
        completion = openai.Completion(asked, self._served)
        job = self._supervisor.answer(messages, openai.options_of(asked), digest(body))
        if asked.stream:
            pieces = self._events(job, completion)
            return Pieces(pieces, EVENTS, self._supervisor, job, self._served.limits.send_s)
        async with attended(request.receive, self._supervisor, job):
            chunks = await whole(job)
        self.metrics.note(chunks[-1].timings, job.queue_s)
        return JSONResponse(completion.whole(chunks, job.queue_s))

    async def _events(self, job: Job, completion: openai.Completion) -> AsyncIterator[bytes]:
        """A stream's events. The first one is sent at once; something is sent every few seconds."""
        yield completion.opening()
        alive, shown = "starting", 0.0
        try:
            while True:
                try:
                    event = await job.next(KEEP_ALIVE_S)
                except TimeoutError:
                    ahead = self._supervisor.ahead_of(job)
                    yield openai.comment(alive if job.started else f"queue {ahead}")
                    continue
                if event is None:
                    return
                if isinstance(event, Chunk):
                    yield completion.piece(event)
                    if event.finish_reason is not None:
                        self.metrics.note(event.timings, job.queue_s)
                        yield completion.closing(event, job.queue_s)
                    continue
                alive = openai.stage_of(event.stage, event.done, event.total)
                if event.done == event.total or time.monotonic() - shown >= PROGRESS_S:
                    shown = time.monotonic()
                    yield completion.progress(event.stage, event.done, event.total)
        except Exception as error:
            yield completion.failure(fault_of(error))

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [status.model(self._served, self._supervisor)]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        self._served.check(request.path_params["id"])
        return JSONResponse(status.model(self._served, self._supervisor))

    async def health(self, _: Request) -> Response:
        """GET /health: 503 until the model is loaded."""
        code, body = status.health(self._supervisor)
        return JSONResponse(body, code, headers={"cache-control": "no-store"})

    async def readyz(self, _: Request) -> Response:
        """GET /readyz, as LLM Vision's set-up asks for it."""
        code, _body = status.health(self._supervisor)
        return Response("ok" if code == 200 else "not ready", code, media_type="text/plain")

    async def props(self, _: Request) -> Response:
        """GET /props."""
        return JSONResponse(status.props(self._served, self._supervisor))

    async def show_metrics(self, _: Request) -> Response:
        """GET /metrics."""
        text, kind = self.metrics.text()
        return Response(text, headers={"content-type": kind})

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(document())

    async def prepare(self, request: Request) -> Response:
        """POST /v1/prepare: returns at once."""
        body = await read_body(request, self._served.limits)
        messages = openai.messages_of(parsed(body, PrepareRequest).messages, self._served.limits)
        key = self._preparations.start(messages, digest(body))
        return JSONResponse({"id": key, "object": "prepare"}, 202)

    async def preparation(self, request: Request) -> Response:
        """GET /v1/prepare/{id}."""
        key = request.path_params["id"]
        known = self._preparations.status(key)
        if known is None:
            raise Fault(404, f"prepare: {key[:40]!r} is not known, or not any more", param="id")
        return JSONResponse(known, headers={"cache-control": "no-store"})

    async def view(self, request: Request) -> Response:
        """POST /v1/view: the picture as the model sees it, a PNG file."""
        body = await read_body(request, self._served.limits)
        url = openai.data_uri(parsed(body, ViewRequest).image_url, "image_url")
        job = self._supervisor.submit(_viewing(url), digest=digest(body), images=(url,))
        async with attended(request.receive, self._supervisor, job):
            picture = await job.next()
        if picture is None:
            raise Fault(499, "view: the client left")
        side = int(self._served.bundle.manifest.n_patches**0.5)
        headers = {"cache-control": "no-store", "x-grid": f"{side}x{side}"}
        return Response(picture, media_type="image/png", headers=headers)


def _viewing(url: str) -> Callable[[Llava, Job], None]:
    def work(llava: Llava, job: Job) -> None:
        file = io.BytesIO()
        llava.view(url).save(file, "PNG")
        job.put(file.getvalue())

    return work


async def _refuse(request: Request, error: Exception) -> Response:
    """An error of ours, in the form of the API that was asked."""
    return refusal(fault_of(error), request.url.path)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, another method."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    text = {404: "there is no such route", 405: f"{request.method} is not for this route"}
    message = f"{path[:80]}: {text.get(error.status_code, error.detail)}"
    return refusal(Fault(error.status_code, message, headers=dict(error.headers or {})), path)

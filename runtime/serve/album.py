"""Routes of the album that the page shows: what it holds, a search, its pictures. Knows HTTP; a Gallery finds.

Threads search and make thumbnails, two at a time, so that the event loop is free; the engine is asked only for the
features of a picture that is not in the album.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, TypeVar

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pocketllava.album.gallery import MAX_HITS, Gallery, Hit, kind_of, thumbnail
from pocketllava.album.prompts import questions
from pocketllava.errors import InputError
from pocketllava.llava import Llava
from pocketllava.serve.faults import Fault, invalid
from pocketllava.serve.openai import data_uri
from pocketllava.serve.served import Served
from pocketllava.serve.supervisor import Job, Supervisor
from pocketllava.serve.transport import attended, digest, parsed, read_body
from pocketllava.types import Options

T = TypeVar("T")
AT_ONCE = 2  # searches and thumbnails
DEFAULT_HITS = 60
MAX_NUMBER = 2**53  # of a picture or a column: what JSON and SQLite both hold
Number = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
KEPT = "private, no-cache"  # by the browser, which asks each time whether it may show it


class SearchRequest(Struct):
    """POST /v1/album/search: words, a picture of the album, another picture, or none of them."""

    words: str | None = None
    like: Number | None = None
    image_url: str | None = None
    column: Number | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_HITS)] = DEFAULT_HITS


class AlbumRoutes:
    """The album, if one is served."""

    def __init__(self, gallery: Gallery | None, supervisor: Supervisor, served: Served) -> None:
        self._gallery, self._supervisor, self._served = gallery, supervisor, served
        self._slots = asyncio.Semaphore(AT_ONCE)

    def all(self) -> list[Route]:
        """Every route."""
        return [
            Route("/v1/album", self.facts, methods=["GET"]),
            Route("/v1/album/search", self.search, methods=["POST"]),
            Route("/v1/album/pictures/{id}", self.picture, methods=["GET"]),
            Route("/v1/album/thumbnails/{id}", self.thumbnail, methods=["GET"]),
        ]

    async def facts(self, _: Request) -> Response:
        """GET /v1/album: no name where none is served."""
        if self._gallery is None:
            return JSONResponse({"object": "album", "name": None, "pictures": 0, "columns": []})
        facts = await self._aside(self._gallery.facts)
        columns = [{"id": q.id, "question": q.prompt, "model": q.model} for q in facts.questions]
        return JSONResponse(
            {"object": "album", "name": facts.name, "pictures": facts.pictures, "columns": columns}
        )

    async def search(self, request: Request) -> Response:
        """POST /v1/album/search."""
        body = await read_body(request, self._served.limits)
        asked = parsed(body, SearchRequest)
        if sum(bool(part) for part in (asked.words, asked.like is not None, asked.image_url)) > 1:
            raise invalid("words: found several of words, like and image_url, expected one", "words")
        hits = await self._found(request, asked, digest(body))
        return JSONResponse({"object": "list", "data": [asdict(hit) for hit in hits]})

    async def _found(self, request: Request, asked: SearchRequest, key: str) -> list[Hit]:
        gallery, column, limit = self._served_gallery(), asked.column, asked.limit
        if asked.image_url:
            return await self._like(request, asked.image_url, limit, key)
        if asked.like is not None:
            picture = asked.like
            return await self._aside(lambda: gallery.like(picture, limit))
        if words := (asked.words or "").strip():
            return await self._aside(lambda: gallery.by_words(words, column, limit))
        return await self._aside(lambda: gallery.first(column, limit))

    async def _like(self, request: Request, image_url: str, limit: int, key: str) -> list[Hit]:
        """Hits for any picture: of the album, or one that the engine looks at."""
        gallery, uri = self._served_gallery(), data_uri(image_url, "image_url")
        known = await self._aside(lambda: gallery.like_bytes(_bytes(uri), limit))
        if known is not None:
            return known
        (question,) = questions(self._served.bundle, [""], Options(), {})
        job = self._supervisor.submit(_featuring(uri), digest=key, images=(uri,))
        async with attended(request.receive, self._supervisor, job):
            mean = await job.next()
        if mean is None:
            raise Fault(499, "search: the client left")
        return await self._aside(lambda: gallery.like_features(question.model_sha256, mean, limit))

    async def picture(self, request: Request) -> Response:
        """GET /v1/album/pictures/{id}: its original bytes."""
        data, sha256 = await self._picture(request)
        return _image(request, data, await self._aside(lambda: kind_of(data)), sha256)

    async def thumbnail(self, request: Request) -> Response:
        """GET /v1/album/thumbnails/{id}: a small JPEG."""
        data, sha256 = await self._picture(request)
        if _is_kept(request, sha256):
            return _image(request, b"", "image/jpeg", sha256)
        return _image(request, await self._aside(lambda: thumbnail(data)), "image/jpeg", sha256)

    async def _picture(self, request: Request) -> tuple[bytes, str]:
        number, gallery = request.path_params["id"], self._gallery
        if gallery is None or not (number.isascii() and number.isdecimal() and len(number) < 16):
            raise Fault(404, f"picture {number[:40]!r}: there is none", param="id")
        try:
            return await self._aside(lambda: gallery.picture(int(number)))
        except InputError as error:
            raise Fault(404, str(error), param="id") from error

    def _served_gallery(self) -> Gallery:
        if self._gallery is None:
            raise invalid("album: none is served; start the server with --album FILE", "album")
        return self._gallery

    async def _aside(self, work: Callable[[], T]) -> T:
        """What a thread of its own makes; few at a time."""
        async with self._slots:
            return await asyncio.to_thread(work)


def _featuring(uri: str) -> Callable[[Llava, Job], None]:
    def work(llava: Llava, job: Job) -> None:
        job.put(llava.image_features(uri).mean(axis=0))

    return work


def _bytes(uri: str) -> bytes:
    """The bytes of a data URI, if it is one: the engine refuses what is none."""
    try:
        return base64.b64decode(uri.partition(",")[2])
    except ValueError:
        return b""


def _is_kept(request: Request, sha256: str) -> bool:
    return request.headers.get("if-none-match") == f'"{sha256}"'


def _image(request: Request, data: bytes, kind: str, sha256: str) -> Response:
    headers = {"etag": f'"{sha256}"', "cache-control": KEPT}
    if _is_kept(request, sha256):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)

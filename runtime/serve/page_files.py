"""The page's files, from the package. Knows names and types; nothing is read from anywhere else."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
NAMES = (
    INDEX, "album.js", "api.js", "app.css", "app.js", "dom.js", "example.png", "icon.svg", "pictures.js", "store.js",
    "view.js", "viewer.js",
)  # fmt: skip
PATHS = ("/", *(f"/{name}" for name in NAMES))


def routes() -> list[Route]:
    """GET and HEAD of each file."""
    return [Route(path, _serve, methods=["GET"]) for path in PATHS]


async def _serve(request: Request) -> Response:
    """One of NAMES, which its route has checked. Browsers ask again each time, and are told if nothing changed."""
    name = request.url.path.removeprefix("/") or INDEX
    data, tag = _file(name)
    headers = {"cache-control": "no-cache", "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, headers={**headers, "content-type": TYPES[name[name.rindex(".") :]]})


@cache
def _file(name: str) -> tuple[bytes, str]:
    """(content, ETag)."""
    data = (files("pocketllava.serve") / "page" / name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:16]}"'

"""Who may ask: Host and Origin of a request, its API key, and the headers of every answer. Knows no routes' work.

A browser opens pages that may send requests to this machine: a page of another origin is told by its Origin, a name
that was rebound to this machine by its Host.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pocketllava.serve.faults import Fault, fault_of
from pocketllava.serve.transport import refusal

LOCAL = ("localhost", "127.0.0.1", "::1")
# Without the key: health for watchdogs, and the page, which asks for the key.
OPEN_PATHS = ("/health", "/v1/health", "/readyz")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self';"
    " manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """Who may ask. hosts: names beside localhost and addresses in digits, which no one can rebind."""

    key: str | None = None
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    open_paths: tuple[str, ...] = OPEN_PATHS


class Guard:
    """ASGI middleware in front of every route."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        self._hosts = {name.lower() for name in (*LOCAL, *access.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on; either way its answer gets the headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        shared = origin if origin in self._access.origins else None

        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._dress(MutableHeaders(scope=message), shared)
            await send(message)

        try:
            self._check(scope, headers)
        except Fault as fault:
            await refusal(fault, scope["path"])(scope, receive, send_with_headers)
            return
        if shared and scope["method"] == "OPTIONS":
            await _preflight()(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:  # its message and its trace may quote the request: neither is logged
            log.error("%s: %s", scope["path"], type(error).__name__)
            if not started:
                await refusal(fault_of(error), scope["path"])(scope, receive, send_with_headers)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises Fault."""
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._is_ours(host):
            raise Fault(403, f"host: {host[:80]!r} is no name of this server", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is None and headers.get("sec-fetch-site") == "cross-site" and scope["path"] != "/":
            origin = "another site"
        if origin is not None and not self._may_read(origin, host):
            hint = f"start it with --origin {origin[:80]} if it may ask"
            raise Fault(
                403, f"origin: {origin[:80]!r} may not ask this server; {hint}", code="origin_not_allowed"
            )
        if scope["method"] != "OPTIONS":
            self._check_key(scope["path"], headers)

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server: a known name, or an address in digits."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if "@" in host or "/" in host:
            return False
        return name in self._hosts or _is_address(name)

    def _may_read(self, origin: str, host: str) -> bool:
        """The page itself, or an origin that was allowed."""
        return origin in self._access.origins or origin in (f"http://{host}", f"https://{host}")

    def _check_key(self, path: str, headers: Headers) -> None:
        """Raises Fault. Without a configured key any Authorization will do: clients send dummies."""
        if self._access.key is None or path in self._access.open_paths:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        if not hmac.compare_digest(given.strip().encode(), self._access.key.encode()):
            message = "authorization: the API key is missing or wrong; expected `Authorization: Bearer KEY`"
            challenge = {"www-authenticate": "Bearer"}
            raise Fault(401, message, type="authentication_error", code="invalid_api_key", headers=challenge)

    def _dress(self, headers: MutableHeaders, shared: str | None) -> None:
        for name, value in HEADERS.items():
            headers[name] = value
        if shared:
            headers["access-control-allow-origin"] = shared
            headers["cross-origin-resource-policy"] = "cross-origin"
            headers.append("vary", "Origin")


def _preflight() -> Response:
    """What a browser asks before it lets an allowed origin's page send JSON."""
    allowed = {
        "access-control-allow-methods": "GET, POST, HEAD, OPTIONS",
        "access-control-allow-headers": "authorization, content-type, x-api-key",
        "access-control-max-age": "600",
    }
    return Response(status_code=204, headers=allowed)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def open_paths(page: Iterable[str]) -> tuple[str, ...]:
    """Paths that need no key: health, and the page's files."""
    return (*OPEN_PATHS, *page)

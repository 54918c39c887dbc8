"""How uvicorn serves the application, and a connection whose request's headers must come in time. Knows no route."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 10.0  # from a connection, or the first byte of its next request, to the end of the headers


class Timely(H11Protocol):
    """uvicorn's, which waits for headers as long as a client likes; the body is read_body()'s to time."""

    headers_s = HEADERS_S
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Headers are awaited."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Headers are awaited, or have come."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited."""
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.headers_s, self.transport.close)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def config(app: Any, http: type[Timely] = Timely) -> uvicorn.Config:
    """uvicorn's settings: no access log, since a request's path is the client's; 5 s to end answers in the end."""
    return uvicorn.Config(
        app,
        http=http,
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )

"""The socket that `serve` listens on: what asyncio makes of its connections."""

from __future__ import annotations

import asyncio
import socket

from pocketllava.commands.serve import listening


async def _is_sent_at_once() -> bool:
    """Whether a server on this socket sends every write at once, without Nagle's algorithm."""
    found: asyncio.Queue[bool] = asyncio.Queue()

    async def connected(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        found.put_nowait(bool(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
        writer.close()
        await writer.wait_closed()

    listener = listening("127.0.0.1", 0)
    async with await asyncio.start_server(connected, sock=listener):
        _reader, writer = await asyncio.open_connection(*listener.getsockname())
        sent = await found.get()
        writer.close()
        await writer.wait_closed()
    return sent


def test_answers_do_not_wait_for_acknowledgements() -> None:
    assert asyncio.run(_is_sent_at_once())

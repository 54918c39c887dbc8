"""Pictures that are encoded before their question is known, and how far that is. Knows jobs; no HTTP."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from pocketllava.serve.faults import fault_of, invalid
from pocketllava.serve.supervisor import Job, Supervisor, preparing
from pocketllava.types import Message

MAX_REMEMBERED = 100


@dataclass
class _Entry:
    job: Job
    watcher: asyncio.Task[None] | None = None
    stage: str = "image"
    done: int = 0
    total: int = 0
    error: str | None = None


class Preparations:
    """The latest preparations, by id."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def start(self, messages: list[Message], digest: str) -> str:
        """Queue one; its id. Raises Fault."""
        *after, last = messages
        if not last.images:
            raise invalid(
                "messages: found no image in the last one, expected what is to be prepared", "messages"
            )
        work = preparing(last.images, after)
        images = tuple(image for message in messages for image in message.images)
        job = self._supervisor.submit(work, digest=digest, ahead=True, images=images)
        key, entry = f"prep-{secrets.token_hex(12)}", _Entry(job)
        entry.watcher = asyncio.create_task(_watch(entry))
        self._entries[key] = entry
        while len(self._entries) > MAX_REMEMBERED:
            _, oldest = self._entries.popitem(last=False)
            self._supervisor.cancel(oldest.job)
        return key

    def status(self, key: str) -> dict[str, Any] | None:
        """How far it is; None for an id that is not known any more."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        fields = {"stage": entry.stage, "done": entry.done, "total": entry.total, "error": entry.error}
        return {"id": key, "object": "prepare", "status": _state(entry), **fields}


def _state(entry: _Entry) -> str:
    if entry.job.done:
        if entry.job.failed is not None:
            return "failed"
        return "cancelled" if entry.job.cancelled() else "done"
    return "queued" if entry.job.started is None else "running"


async def _watch(entry: _Entry) -> None:
    """Note the job's progress until it ends."""
    try:
        while (event := await entry.job.next()) is not None:
            entry.stage, entry.done, entry.total = event.stage, event.done, event.total
    except Exception as error:
        entry.error = fault_of(error).message

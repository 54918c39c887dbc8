"""A FIFO queue in front of one Llava, which one thread owns: llama.cpp runs one call at a time, and Llava lets a later
call of a thread end an earlier stream of it, so no pool of threads may touch it.

Knows jobs, cancelling, the engine's death and idleness; no HTTP, no API.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import closing, suppress
from typing import Any, Literal

from pocketllava.errors import BackendError, EngineDied, PocketLlavaError
from pocketllava.llava import Llava
from pocketllava.serve.faults import Fault, fault_of, quarantined, queue_full
from pocketllava.types import Chunk, ImageSource, Message, Options, Progress

State = Literal["loading", "ok", "restarting", "idle", "failed", "closed"]
Work = Callable[[Llava, "Job"], None]
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.2, 30.0
MAX_DEATHS = 2  # of the engine during one request
MAX_REMEMBERED = 1000  # requests that ended the engine once
POLL_S = 0.05  # how often a preparation is looked at
_END: Any = object()

log = logging.getLogger(__name__)


def load_engine(path: str, load: dict[str, Any]) -> Llava:
    """The model in a child process. Raises what Llava.load does."""
    return Llava.load(path, isolated=True, **load)


class Job:
    """Something the engine does for one client. Made on the event loop, which also takes its events."""

    def __init__(self, work: Work, digest: str, *, ahead: bool, images: tuple[ImageSource, ...]) -> None:
        """ahead: it prepares for a question, and makes way for others. images: what it is about."""
        self.work, self.digest, self.ahead, self.images = work, digest, ahead, images
        self.created = time.perf_counter()
        self.started: float | None = None
        self.queue_s = 0.0
        self.done = False
        self.failed: BaseException | None = None
        self._stop = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def cancel(self) -> None:
        """End it: at once in the queue, within a step while it runs."""
        self._stop.set()

    def cancelled(self) -> bool:
        """Whether it was cancelled; the engine asks before every step."""
        return self._stop.is_set()

    def put(self, event: Any) -> None:
        """Hand an event to the event loop, from the engine's thread. A loop that is closed wants none."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def end(self, error: BaseException | None = None) -> None:
        """No events follow. An error is raised where they are awaited."""
        self.failed, self.done = error, True
        self.put(_END)

    async def next(self, timeout_s: float | None = None) -> Any:
        """The next event, None after the last. Raises TimeoutError, and what ended the job."""
        try:
            event = await asyncio.wait_for(self._events.get(), timeout_s)
        except asyncio.TimeoutError:  # its own class in Python 3.10
            raise TimeoutError from None
        if event is not _END:
            return event
        if self.failed is not None:
            raise self.failed
        return None

    async def events(self) -> AsyncIterator[Any]:
        """Every event. Leaving the loop cancels the job."""
        try:
            while (event := await self.next()) is not None:
                yield event
        finally:
            self.cancel()


class Supervisor:
    """Owns the model. Every method may be called from the event loop; none of them blocks."""

    def __init__(self, load: Callable[[], Llava], *, queue: int = 8, idle_s: float | None = None) -> None:
        self._load, self._max_queue, self._idle_s = load, queue, idle_s
        self._llava: Llava | None = None
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._deaths: Counter[str] = Counter()
        self._backoff_s = 0.0
        self._state: State = "loading"
        self.message = "Loading model"
        self.restarts = 0
        self.devices: tuple[str, str] | None = None
        self.n_ctx: int | None = None
        self._used_at = time.time()
        self._thread = threading.Thread(target=self._run, name="pocketllava engine", daemon=True)

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Cancel everything and free the model."""
        with self._changed:
            self._state = "closed"
            if self._running:
                self._running.cancel()
            for job in self._waiting:
                job.end(Fault(503, "server: it is shutting down", type="unavailable_error"))
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def state(self) -> State:
        """What /health says."""
        return self._state

    @property
    def waiting(self) -> int:
        """Jobs in the queue, without the one that runs."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self._running is not None

    @property
    def frees_at(self) -> float | None:
        """When the model is freed if nobody asks (seconds of time.time()); None for never."""
        if self._idle_s is None:
            return None
        return (time.time() if self.busy else self._used_at) + self._idle_s

    def ahead_of(self, job: Job) -> int:
        """Jobs that come before it."""
        with self._changed:
            place = self._waiting.index(job) if job in self._waiting else 0
            return place + (self._running is not None)

    def submit(
        self, work: Work, *, digest: str = "", ahead: bool = False, images: tuple[ImageSource, ...] = ()
    ) -> Job:
        """Queue a job. Raises Fault if the queue is full, or this request ended the engine before."""
        if digest and self._deaths[digest] >= MAX_DEATHS:
            raise quarantined()
        job = Job(work, digest, ahead=ahead, images=images)
        with self._changed:
            if self._state == "closed":
                raise Fault(503, "server: it is shutting down", type="unavailable_error")
            self._make_way(job)
            if len(self._waiting) >= self._max_queue:
                raise queue_full(self._max_queue)
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job; one that waits leaves the queue at once."""
        job.cancel()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.end()

    def answer(self, messages: list[Message], options: Options, digest: str = "") -> Job:
        """A job whose events are Progress and Chunks."""
        images = tuple(image for message in messages for image in message.images)
        return self.submit(_answering(messages, options), digest=digest, images=images)

    def wake(self) -> None:
        """Load a model that sleeps."""
        with suppress(Fault):
            self.submit(lambda llava, _job: _load(llava))

    def unload(self) -> None:
        """Free the model as soon as nothing waits; the next job loads it again."""
        with suppress(Fault):
            self.submit(lambda _llava, _job: self._unload())

    def _make_way(self, job: Job) -> None:
        """Preparations end that are no help to this job: those of other images."""
        for other in (*self._waiting, self._running):
            if other is not None and other.ahead and job.images[: len(other.images)] != other.images:
                other.cancel()
        for other in [other for other in self._waiting if other.cancelled()]:
            self._waiting.remove(other)
            other.end()

    def _run(self) -> None:
        """The engine's thread."""
        self._loaded(None)
        while (job := self._next()) is not None:
            if job is _END:
                self._unload()
                continue
            job.started = time.perf_counter()
            job.queue_s = job.started - job.created
            self._do(job)
            with self._changed:
                self._running, self._used_at = None, time.time()
            if self._state == "restarting":
                self._revive()
        if self._llava is not None:
            self._llava.close()

    def _next(self) -> Any:
        """The next job; _END after a while without any; None when the server ends."""
        with self._changed:
            while not self._waiting and self._state != "closed":
                timeout_s = self._idle_s if self._state == "ok" else None
                if not self._changed.wait(timeout_s) and not self._waiting:
                    return _END
            if self._state == "closed":
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _do(self, job: Job) -> None:
        error: BaseException | None = None
        try:
            if not job.cancelled() and (llava := self._loaded(job)) is not None:
                self._set("ok", "")
                job.work(llava, job)
                self._backoff_s = 0.0
        except EngineDied as death:
            error = death
            self._note_death(job, death)
        except PocketLlavaError as refusal:
            error = refusal
        except Fault as fault:
            error = fault
        except Exception as unforeseen:  # the thread must live: every request would wait for ever
            log.error("request: %s in the engine's thread", type(unforeseen).__name__)
            error = unforeseen
        job.end(error)

    def _revive(self) -> None:
        """Start an engine that ended, so that /health is well again before the next request."""
        try:
            if (llava := self._loaded(None)) is not None:
                _load(llava)
                self._set("ok", "")
        except PocketLlavaError as error:
            self._failed(error)

    def _loaded(self, job: Job | None) -> Llava | None:
        """The model; loads it if need be, after a pause if the engine ended or could not be loaded."""
        if self._backoff_s:
            with self._changed:
                self._changed.wait_for(lambda: self._state == "closed", self._backoff_s)
        if self._state == "closed" or (job and job.cancelled()):
            return None
        if self._llava is None:
            self._set("restarting" if self.restarts else "loading", "Loading model")
            try:
                self._llava = self._load()
            except Exception as error:
                self._failed(error)
                if job is not None:
                    raise
                return None
            self.devices, self.n_ctx = self._llava.devices, self._llava.n_ctx
            self._set("ok", "")
        return self._llava

    def _failed(self, error: Exception) -> None:
        self._backoff_s = min(LONGEST_BACKOFF_S, self._backoff_s * 2 or FIRST_BACKOFF_S)
        self._set("failed", str(error) if isinstance(error, PocketLlavaError) else type(error).__name__)
        log.error("model: cannot be loaded (%s)", self.message)

    def _note_death(self, job: Job, death: BaseException) -> None:
        """Remember who was answered when the engine ended, and wait longer before each new start."""
        self.restarts += 1
        self._backoff_s = min(LONGEST_BACKOFF_S, self._backoff_s * 2 or FIRST_BACKOFF_S)
        if job.digest:
            if len(self._deaths) >= MAX_REMEMBERED:
                self._deaths.clear()
            self._deaths[job.digest] += 1
        self._set("restarting", str(death))
        log.error("engine: it ended and starts again (%s)", death)

    def _unload(self) -> None:
        """Free the model; its next call loads it again."""
        if self._llava is None:
            return
        self._llava.unload()
        self._set("idle", "The model sleeps; the next question loads it")

    def _set(self, state: State, message: str) -> None:
        with self._changed:
            if self._state != "closed":
                self._state, self.message = state, message


def _load(llava: Llava) -> None:
    """The cheapest call that needs the model: one that was freed, or whose process ended, is loaded for it."""
    llava.count_tokens([Message("user", "")])


def _answering(messages: list[Message], options: Options) -> Work:
    def work(llava: Llava, job: Job) -> None:
        stream: Any = llava.stream(messages, options=options, should_stop=job.cancelled, on_progress=job.put)
        with closing(stream) as chunks:
            for chunk in chunks:
                job.put(chunk)

    return work


def preparing(images: tuple[ImageSource, ...], after: list[Message]) -> Work:
    """Encodes images and evaluates the conversation up to them. Its events are Progress."""

    def work(llava: Llava, job: Job) -> None:
        preparation = llava.prefill(images, after=after)
        shown: Progress | None = None
        while not preparation.wait(POLL_S):
            if job.cancelled():
                preparation.cancel()
            progress = preparation.progress
            if progress is not None and progress != shown:
                job.put(progress)
                shown = progress

    return work


async def whole(job: Job) -> list[Chunk]:
    """An answer's chunks, once all are there. Raises Fault."""
    chunks: list[Chunk] = []
    try:
        async for event in job.events():
            if isinstance(event, Chunk):
                chunks.append(event)
    except Exception as error:
        raise fault_of(error) from error
    if not chunks or chunks[-1].finish_reason is None:
        raise fault_of(BackendError("answer: it broke off; ask again"))
    return chunks

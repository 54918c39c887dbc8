"""Whose turn it is: one answer at a time on one model. Knows threads, nothing of models.

Calls from other threads wait until the running answer is finished. A call from the thread that left a
stream suspended ends that stream, because waiting for it would wait for ever; resuming it is an error.
A child of fork() shares the model's memory but not its threads, so it gets no lease.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pocketllava.errors import StateError

WAKE_S = 0.1  # how often a waiting call looks for a stop, and lets Ctrl-C through on Windows


class Lease:
    """The right to use the model, from acquire() to release()."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.running = True
        self.ended = False


class Turns:
    """One lease after the other."""

    def __init__(
        self, lock: ModelLock, timeout_s: float | None, should_stop: Callable[[], bool] | None
    ) -> None:
        self._lock, self._timeout_s, self._should_stop = lock, timeout_s, should_stop
        self._lease: Lease | None = lock.acquire(timeout_s, should_stop)

    @contextmanager
    def between(self) -> Iterator[None]:
        """Calls of other threads, and of this one, may go in between. Raises as ModelLock.acquire() does."""
        self.give_back()
        yield
        self._lease = self._lock.acquire(self._timeout_s, self._should_stop)

    def give_back(self) -> None:
        """Harmless where there is no lease."""
        lease, self._lease = self._lease, None
        if lease is not None:
            self._lock.release(lease)


class ModelLock:
    """Gives out leases, one at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._current: Lease | None = None
        self._closed = False
        self._pid = os.getpid()

    def check(self) -> None:
        """Raises StateError once closed, and in a child of fork()."""
        if os.getpid() != self._pid:
            raise StateError(
                f"model: loaded by process {self._pid}, used in its child {os.getpid()}; load it there,"
                " or start workers by spawn"
            )
        if self._closed:
            raise StateError("model: used after close(); load it again")

    def acquire(self, timeout_s: float | None = None, should_stop: Callable[[], bool] | None = None) -> Lease:
        """Wait for the calls before. Raises StateError as check() does and after timeout_s, Interrupted."""
        self.check()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self._current is not None and not self._may_take_over(self._current):
                self._wait(end, timeout_s, should_stop)
            self.check()
            if self._current is not None:
                self._current.ended = True
            self._current = Lease()
            return self._current

    def _wait(
        self, end: float | None, timeout_s: float | None, should_stop: Callable[[], bool] | None
    ) -> None:
        if should_stop is not None and should_stop():
            from pocketllava.llamacpp.guard import Interrupted

            raise Interrupted
        left_s = WAKE_S if end is None else end - time.monotonic()
        if left_s <= 0:
            raise StateError(
                f"model: still busy with another call after {timeout_s:g} s (queue_timeout_s);"
                " ask again later, or wait longer"
            )
        self._changed.wait(min(left_s, WAKE_S))

    def _may_take_over(self, lease: Lease) -> bool:
        return not lease.running and lease.thread == threading.get_ident()

    @contextmanager
    def suspended(self, lease: Lease) -> Iterator[None]:
        """While a stream's consumer holds control. Raises StateError if a newer call took over meanwhile."""
        with self._changed:
            lease.thread, lease.running = threading.get_ident(), False
        yield
        with self._changed:
            if lease.ended:
                raise StateError(
                    "stream: a newer call on this model ended it; finish or close a stream first"
                )
            lease.thread, lease.running = threading.get_ident(), True

    def release(self, lease: Lease) -> None:
        """Give the lease back; harmless if a newer call has taken it."""
        with self._changed:
            lease.ended = True
            if self._current is lease:
                self._current = None
                self._changed.notify_all()

    @contextmanager
    def lease(
        self, should_stop: Callable[[], bool] | None = None, timeout_s: float | None = None
    ) -> Iterator[Lease]:
        """A lease for a call that does not stream."""
        lease = self.acquire(timeout_s, should_stop)
        try:
            yield lease
        finally:
            self.release(lease)

    @contextmanager
    def turns(
        self, timeout_s: float | None = None, should_stop: Callable[[], bool] | None = None
    ) -> Iterator[Turns]:
        """Leases for a call that gives the model back now and then, and goes on with a state of its own."""
        turns = Turns(self, timeout_s, should_stop)
        try:
            yield turns
        finally:
            turns.give_back()

    def close(self) -> bool:
        """Wait for the running answer, then let nobody begin. False if it was closed already."""
        try:
            lease = self.acquire()
        except StateError:
            return False
        with self._changed:
            self._closed = True
        self.release(lease)
        return True

"""Whose turn it is: one answer at a time on one model. Knows threads, nothing of models.

Calls from other threads wait until the running answer is finished. A call from the thread that left a
stream suspended ends that stream, because waiting for it would wait for ever; resuming it is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pocketllava.errors import StateError


class Lease:
    """The right to use the model, from acquire() to release()."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.running = True
        self.ended = False


class ModelLock:
    """Gives out leases, one at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._current: Lease | None = None
        self._closed = False

    def acquire(self) -> Lease:
        """Wait for one's turn. Raises StateError once closed."""
        with self._changed:
            while self._current is not None and not self._may_take_over(self._current):
                self._changed.wait()
            if self._closed:
                raise StateError("model: used after close(); load it again")
            if self._current is not None:
                self._current.ended = True
            self._current = Lease()
            return self._current

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
    def lease(self) -> Iterator[Lease]:
        """A lease for a call that does not stream."""
        lease = self.acquire()
        try:
            yield lease
        finally:
            self.release(lease)

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

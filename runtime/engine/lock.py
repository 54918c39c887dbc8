"""Whose turn it is: one answer at a time on one model. Knows threads, nothing of models.

Calls from other threads wait until the running answer is finished. A call from the thread that left a
stream suspended ends that stream, because waiting for it would wait for ever; resuming it is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pocketllava.errors import InputError


class Turn:
    """The right to use the model, from begin() to end()."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.running = True
        self.ended = False


class Turns:
    """Hands out turns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._current: Turn | None = None
        self._closed = False

    def begin(self) -> Turn:
        """Wait for a turn. Raises InputError once closed."""
        with self._changed:
            while self._current is not None and not self._may_take_over(self._current):
                self._changed.wait()
            if self._closed:
                raise InputError("model: used after close(); load it again")
            if self._current is not None:
                self._current.ended = True
            self._current = Turn()
            return self._current

    def _may_take_over(self, turn: Turn) -> bool:
        return not turn.running and turn.thread == threading.get_ident()

    @contextmanager
    def suspended(self, turn: Turn) -> Iterator[None]:
        """While a stream's consumer holds control. Raises InputError if a newer call took over meanwhile."""
        with self._changed:
            turn.thread, turn.running = threading.get_ident(), False
        yield
        with self._changed:
            if turn.ended:
                raise InputError(
                    "stream: a newer call on this model ended it; finish or close a stream first"
                )
            turn.thread, turn.running = threading.get_ident(), True

    def end(self, turn: Turn) -> None:
        """Give the turn back; harmless if a newer call has taken it."""
        with self._changed:
            turn.ended = True
            if self._current is turn:
                self._current = None
                self._changed.notify_all()

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """A turn for a call that does not stream."""
        turn = self.begin()
        try:
            yield turn
        finally:
            self.end(turn)

    def close(self) -> bool:
        """Wait for the running answer, then let nobody begin. False if it was closed already."""
        try:
            turn = self.begin()
        except InputError:
            return False
        with self._changed:
            self._closed = True
        self.end(turn)
        return True

"""An image that is encoded and evaluated before its question is known, in a thread of its own.

Knows threads, and images by what tells their content apart; the work is a function it is given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from pocketllava.types import OnProgress, Progress

Work = Callable[[Callable[[], bool], OnProgress], None]


class Preparation:
    """Made by Llava.prefill. A question about the same images waits for it, one about others ends it."""

    def __init__(self, work: Work, digests: Sequence[str | None]) -> None:
        self._digests, self._work = tuple(digests), work
        self._stop = threading.Event()
        self._error: Exception | None = None
        self.progress: Progress | None = None  # None: not begun, or all was known
        self._thread = threading.Thread(target=self._run, name="pocketllava prepare", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is done; False if it is still going on after timeout_s. Raises what went wrong."""
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return self.done

    @property
    def done(self) -> bool:
        """Whether nothing goes on any more: finished, failed or cancelled."""
        return not self._thread.is_alive()

    def cancel(self) -> None:
        """Stop soon; does not wait."""
        self._stop.set()

    def helps(self, digests: Sequence[str | None]) -> bool:
        """Whether a conversation with images of this content, in this order, begins with the prepared ones."""
        return tuple(digests[: len(self._digests)]) == self._digests

    def _run(self) -> None:
        from pocketllava.llamacpp.guard import Interrupted

        try:
            self._work(self._stop.is_set, self._note)
        except Interrupted:
            pass
        except Exception as error:
            self._error = error

    def _note(self, progress: Progress) -> None:
        self.progress = progress

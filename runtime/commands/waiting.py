"""A bar on a terminal while an answer is waited for: images that are encoded, then positions that are evaluated.

Knows Progress and tqdm; not what is asked.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator

    from pocketllava.types import Chunk, Progress

DELAY_S = 0.5  # what is quicker shows nothing
LABELS = {"image": ("image", "tile"), "prompt": ("prompt", "token")}


class Waiting:
    """An on_progress callback; close() before anything else is shown. Draws nothing unless stderr is a terminal."""

    def __init__(self, *, quiet: bool = False, delay_s: float = DELAY_S) -> None:
        self._shows = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._delay_s = delay_s
        self._stage = ""
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        """Called by the thread that evaluates."""
        if not self._shows:
            return
        if progress.stage != self._stage:
            self.close()
            self._stage, self._bar = progress.stage, self._new(progress)
        self._bar.update(progress.done - self._bar.n)

    def close(self) -> None:
        """Wipe the bar."""
        if self._bar is not None:
            self._bar.close()
        self._stage, self._bar = "", None

    def _new(self, progress: Progress) -> Any:
        from tqdm import tqdm

        label, unit = LABELS[progress.stage]
        return tqdm(total=progress.total, desc=label, unit=unit, leave=False, delay=self._delay_s)


def shown(chunks: Generator[Chunk, None, None], waiting: Waiting) -> Generator[Chunk, None, None]:
    """The chunks of an answer; the bar is gone before the first of them, or the failure, is seen."""
    try:
        for chunk in chunks:
            waiting.close()
            yield chunk
    finally:
        chunks.close()  # waits for its thread, so that nothing draws anymore
        waiting.close()

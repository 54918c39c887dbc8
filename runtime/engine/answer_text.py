"""Token bytes -> text, whole characters only, ending before the first stop text. Knows bytes; no tokens."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class AnswerText:
    """Token bytes -> text, whole characters only, ending before the first stop text.

    A text that may become a stop text is held back until it is clear. The space that SentencePiece puts
    before the first word is dropped, as the reference's decoder does.
    """

    def __init__(self, stop: Sequence[str], begun: bool = False) -> None:
        """begun: its first words are given already, so that a space before the next ones counts."""
        self._stop, self.stopped = stop, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self._begun = "", begun

    def add(self, piece: bytes) -> str:
        """The text that this token makes certain; "" while it may still be part of a stop text."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """What was held back, at the end of an answer."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if text and not self._begun:
            text, self._begun = text.removeprefix(" "), True
        text = self._held + text
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""Breaks lines between words while they stream. Knows columns; prints nothing."""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit.utils import get_cwidth

MAX_WORD = 30  # columns of a word that are held back until its end; a longer one is shown in parts
TAB = "    "


class Wrap:
    """Text in pieces -> the same with line breaks for spaces, where a word would not fit into the columns."""

    def __init__(self, columns: Callable[[], int]) -> None:
        """columns: the terminal's width, which may change."""
        self._columns, self._column = columns, 0
        self._gap, self._word = "", ""

    def add(self, text: str) -> str:
        """The text that can be shown by now."""
        return "".join(map(self._character, text.replace("\t", TAB)))

    def finish(self) -> str:
        """The last word, at the end of a text; the next text begins a line."""
        shown, self._column, self._gap = self._flush(), 0, ""
        return shown

    def _character(self, c: str) -> str:
        if c == "\n":
            return self.finish() + c
        if c == " ":
            shown = self._flush()
            self._gap += c
            return shown
        self._word += c
        lone = get_cwidth(c) > 1  # scripts of wide characters break anywhere
        return self._flush() if lone or get_cwidth(self._word) >= MAX_WORD else ""

    def _flush(self) -> str:
        """The word so far, after the gap before it or on a new line."""
        if not self._word:
            return ""
        word, width = self._word, get_cwidth(self._word)
        fits = self._column + len(self._gap) + width <= self._columns()
        before = self._gap if fits else "\n" if self._column else ""
        self._column = self._column + len(before) + width if fits else width
        self._gap, self._word = "", ""
        return before + word

"""What is wrong with an answer: a loop, an end that was cut, a refusal. Knows token ids and texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from pocketllava.errors import InputError

N_GRAM, TIMES = 8, 3  # tokens in a row, and how often
RETRY_PENALTY = 1.2  # of repeated tokens, for the one more try that a loop gets
LOOP, CUT, REFUSED, RETRIED = "loop", "cut", "refused", "retried"


class LoopFinder:
    """Sees an answer's tokens one by one; `found` once the same N_GRAM of them came TIMES times."""

    def __init__(self) -> None:
        self.found = False
        self._last: list[int] = []
        self._seen: Counter[tuple[int, ...]] = Counter()

    def add(self, tokens: Sequence[int]) -> bool:
        """Whether the answer is a loop by now."""
        for token in tokens:
            self._last = [*self._last[1 - N_GRAM :], token]
            if len(self._last) == N_GRAM:
                self._seen[tuple(self._last)] += 1
                self.found = self.found or self._seen[tuple(self._last)] >= TIMES
        return self.found


def patterns(deny: Sequence[str]) -> list[re.Pattern[str]]:
    """Expressions that mark an answer as a refusal. Raises InputError."""
    try:
        return [re.compile(expression, re.IGNORECASE) for expression in deny]
    except re.error as error:
        raise InputError(f"deny: {error.pattern!r} is no regular expression ({error})") from error


def mark_of(
    text: str, finish_reason: str, *, looped: bool, retried: bool, deny: Sequence[re.Pattern[str]]
) -> str:
    """The one word that is kept with an answer; nothing for a good one."""
    if looped:
        return LOOP
    if any(expression.search(text) for expression in deny):
        return REFUSED
    if finish_reason == "length":
        return CUT
    return RETRIED if retried else ""


def whole_sentences(text: str) -> str:
    """An answer that was cut, up to its last sentence's end; as it is if there is none."""
    end = max(text.rfind(stop) for stop in (". ", "! ", "? ", ".\n", "。"))
    return text if end < 0 or text.rstrip().endswith((".", "!", "?", "。")) else text[: end + 1]

"""Which messages of a conversation that got too long are left out. Knows messages and a way to count tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from pocketllava.errors import ContextOverflow
from pocketllava.types import Message


def without_oldest(
    messages: Sequence[Message], n_tokens: Callable[[Sequence[Message]], int], room: int
) -> list[Message]:
    """The conversation without its oldest turns, as few as make it take at most `room` tokens.

    A turn is a user's message and what follows it. Kept in any case: system messages, the last turn, and
    the last turn that shows images, since they are what is spoken of. The rest may still not fit. The
    conversation is counted log2(turns) times, because counting renders it.
    """
    turns = _turns(messages)
    last_shown = max((n for n, turn in enumerate(turns) if any(m.images for m in turn)), default=-1)
    droppable = [n for n in range(len(turns) - 1) if n != last_shown and turns[n][0].role != "system"]

    def without(count: int) -> list[Message]:
        dropped = set(droppable[:count])
        return [m for n, turn in enumerate(turns) if n not in dropped for m in turn]

    def fits(count: int) -> bool:
        try:
            return n_tokens(without(count)) <= room
        except ContextOverflow:  # of a text that is too long to be tokenized
            return False

    if not droppable or fits(0):
        return list(messages)
    counts = range(1, len(droppable))
    return without(1 + bisect_left(counts, True, key=fits))


def _turns(messages: Sequence[Message]) -> list[list[Message]]:
    """System messages alone, every other turn from its user's message on."""
    turns: list[list[Message]] = []
    for message in messages:
        if message.role == "assistant" and turns and turns[-1][0].role != "system":
            turns[-1].append(message)
        else:
            turns.append([message])
    return turns

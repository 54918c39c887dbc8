"""Which messages of a conversation that got too long are left out. Knows messages and a way to count tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pocketllava.types import Message


def leave_out(
    messages: Sequence[Message], n_tokens: Callable[[Sequence[Message]], int], room: int
) -> list[Message]:
    """The conversation without its oldest turns, as few as make it take at most `room` tokens.

    A turn is a user's message and what follows it. Kept in any case: system messages, the last turn, and
    the last turn that shows images, since they are what is spoken of. What is left may still not fit.
    """
    turns = _turns(messages)
    spoken_of = max((n for n, turn in enumerate(turns) if any(m.images for m in turn)), default=-1)
    droppable = [n for n in range(len(turns) - 1) if n != spoken_of and turns[n][0].role != "system"]
    left = list(messages)
    dropped: set[int] = set()
    for n in droppable:
        if n_tokens(left) <= room:
            break
        dropped.add(n)
        left = [m for k, turn in enumerate(turns) if k not in dropped for m in turn]
    return left


def _turns(messages: Sequence[Message]) -> list[list[Message]]:
    """System messages alone, every other turn from its user's message on."""
    turns: list[list[Message]] = []
    for message in messages:
        if message.role == "assistant" and turns and turns[-1][0].role != "system":
            turns[-1].append(message)
        else:
            turns.append([message])
    return turns

"""How likely a model is to answer with each of a few texts, by scoring every token of each (teacher forcing).

Knows token ids and logits; no messages, no sampling. A choice is scored as what an answer may begin with: with or
without a space before it, its first letter as given or the other case ("yes", "Yes"), unless that is a choice itself.
The end of the answer is not scored, since a model that explains itself goes on after "Yes" and is no less sure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pocketllava.engine.logprobs import log_softmax
from pocketllava.llamacpp.guard import Interrupted, ShouldStop
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.prompt.template import without_prefix
from pocketllava.types import Choice

Ids = tuple[int, ...]
NEGLIGIBLE = math.log(1e-4)  # a spelling this much less likely than another of its choice is not evaluated


@dataclass(frozen=True)
class Scored:
    """Choices, the likeliest first, and the tokens that the model would most likely write the first of them with."""

    choices: tuple[Choice, ...]
    token_ids: Ids


def scored(text: TextModel, choices: Sequence[str], should_stop: ShouldStop | None = None) -> Scored:
    """Score choices behind the prompt that the KV cache holds, and leave it there alone.

    Raises Interrupted once should_stop() is true, BackendError.
    """
    ids = spellings(text, choices)
    first = log_softmax(text.logits())
    logprobs: dict[Ids, float] = {}
    for spelled in ids:
        best = -math.inf
        for spelling in sorted(spelled, key=lambda s: -first[s[0]]):
            if should_stop is not None and should_stop():
                raise Interrupted
            if first[spelling[0]] - best > NEGLIGIBLE:
                logprobs[spelling] = float(first[spelling[0]]) + _rest(text, spelling, should_stop)
                best = max(best, logprobs[spelling])
    return _ranked(choices, ids, logprobs)


def spellings(text: TextModel, choices: Sequence[str]) -> list[list[Ids]]:
    """The token ids that may write each choice, all different."""
    seen: set[Ids] = set()
    result = []
    for choice in choices:
        ids = {tuple(without_prefix(spelled, text.tokenize)) for spelled in _texts(choice, choices)} - seen
        seen |= ids
        result.append(sorted(ids))
    return result


def _texts(choice: str, choices: Sequence[str]) -> Iterator[str]:
    for first in dict.fromkeys((choice[0], choice[0].swapcase())):
        if first == choice[0] or first + choice[1:] not in choices:
            yield first + choice[1:]
            yield f" {first}{choice[1:]}"


def _rest(text: TextModel, ids: Ids, should_stop: ShouldStop | None) -> float:
    """The log probability of all tokens after the first, each given those before it."""
    if len(ids) == 1:
        return 0.0
    n = text.n_tokens
    try:
        with text.interruptible(should_stop):
            rows = log_softmax(text.logits_after(list(ids[:-1])))
    finally:
        text.truncate(n)
    return float(sum(row[token] for row, token in zip(rows, ids[1:], strict=True)))


def _ranked(choices: Sequence[str], ids: list[list[Ids]], logprobs: dict[Ids, float]) -> Scored:
    """Of "red" and "red car" the shorter one counts without the longer one's share of its probability."""
    highest = max(logprobs.values())
    shares = {spelling: math.exp(logprob - highest) for spelling, logprob in logprobs.items()}
    alone = {spelling: max(0.0, shares[spelling] - _longer(spelling, shares)) for spelling in shares}
    sums = [sum(alone.get(spelling, 0.0) for spelling in spelled) for spelled in ids]
    order = sorted(range(len(choices)), key=lambda n: -sums[n])
    ranked = tuple(Choice(choices[n], sums[n] / sum(sums)) for n in order)
    return Scored(ranked, max((s for s in ids[order[0]] if s in alone), key=lambda s: alone[s]))


def _longer(spelling: Ids, shares: dict[Ids, float]) -> float:
    """The shares of the spellings that begin with this one, each text counted once."""
    longer = [other for other in shares if len(other) > len(spelling) and other[: len(spelling)] == spelling]
    nearest = (s for s in longer if not any(len(o) < len(s) and s[: len(o)] == o for o in longer))
    return sum(shares[s] for s in nearest)

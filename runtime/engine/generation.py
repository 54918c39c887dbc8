"""A prompt in the KV cache -> the answer's tokens, one by one, sampled freely or within a grammar.

Knows a TextModel, a Constraint and a Sampler; no messages, no text of answers.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pocketllava.engine.logprobs import token_logprob
from pocketllava.engine.structured import Constraint
from pocketllava.llamacpp.guard import deferred_interrupts
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.types import Options, TokenLogprob


@dataclass(frozen=True)
class Token:
    """A token of an answer. logprob: if Options.top_logprobs asks for it."""

    id: int
    logprob: TokenLogprob | None = None


def settings(options: Options) -> dict[str, Any]:
    """Options as llama_cpp.Llama.generate names them."""
    return {
        "temp": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "repeat_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
    }


def free(text: TextModel, prompt: list[int], seed: int, options: Options) -> Generator[Token, None, None]:
    """Tokens without end, as llama_cpp samples them."""
    with closing(text.generate(prompt, seed=seed, **settings(options))) as tokens:
        for token in tokens:
            yield _token(text, token, options.top_logprobs)


def constrained(
    text: TextModel, constraint: Constraint, seed: int, options: Options, limit: int
) -> Generator[Token, None, None]:
    """At most `limit` tokens of JSON; ends by itself, or with an end token, when the JSON is whole.

    The token that was sampled and those that are forced after it are evaluated in one batch, unless log
    probabilities are wanted: these need the logits before each.
    """
    sampler, n_top = text.sampler(seed=seed, **settings(options)), options.top_logprobs
    while limit > 0:
        token = sampler.choose(text.logits(), constraint.allowed())
        if text.vocabulary.is_end(token):
            yield _token(text, token, n_top)
            return
        constraint.consume([token])
        forced = constraint.forced()[: limit - 1]
        limit -= 1 + len(forced)
        yield _token(text, token, n_top)
        run = [token]
        for token in forced:
            if n_top is not None:
                _evaluate(text, run)
                run = []
            constraint.consume([token])
            sampler.accept(token)
            yield _token(text, token, n_top)
            run.append(token)
        if constraint.complete:
            return
        if limit:
            _evaluate(text, run)


def _evaluate(text: TextModel, tokens: list[int]) -> None:
    with deferred_interrupts():
        text.decode_tokens(tokens)


def _token(text: TextModel, token: int, n_top: int | None) -> Token:
    """A token that the last logits are for."""
    if n_top is None:
        return Token(token)
    return Token(token, token_logprob(text.logits(), token, n_top, text.vocabulary))

"""Logits -> log probabilities of tokens, as an answer carries them. Knows arrays and a vocabulary; no sampling."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketllava.llamacpp.vocabulary import Vocabulary
from pocketllava.types import TokenLogprob


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(..., n_vocab) logits -> log probabilities."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    normalized: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return normalized


def token_logprob(
    logits: npt.NDArray[np.float32], token: int, n_top: int, vocabulary: Vocabulary
) -> TokenLogprob:
    """A token's log probability beside those of the n_top likeliest, by logits (n_vocab,)."""
    logprobs = log_softmax(logits)
    top = np.argpartition(-logprobs, n_top)[:n_top] if n_top < len(logprobs) else np.arange(len(logprobs))
    ranked = sorted(map(int, top), key=lambda i: (-logprobs[i], i))
    entries = tuple((_text(vocabulary, i), float(logprobs[i]), vocabulary.piece(i)) for i in ranked)
    return TokenLogprob(_text(vocabulary, token), float(logprobs[token]), vocabulary.piece(token), entries)


def _text(vocabulary: Vocabulary, token: int) -> str:
    """A token's text; that of a control token as the vocabulary writes it, such as "</s>"."""
    return vocabulary.piece(token).decode("utf-8", "replace") or vocabulary.text(token)

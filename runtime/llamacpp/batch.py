"""Token ids or rows of features -> one llama_batch -> llama_decode. Knows llama_batch and nothing above it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError

Logits = Literal["none", "last", "all"]


def decode_features(
    context: Any,
    features: npt.NDArray[np.float32],
    first: int,
    n_batch: int,
    *,
    logits: Logits = "none",
    sequence: int = 0,
) -> None:
    """Evaluate (n, n_embd) float32 features at positions first, first + 1, ... of a sequence.

    They go in one batch unless there are more than n_batch. Attention is causal, as in the reference.
    logits: for which rows the last block and the output are computed; "last" is that of each batch.
    Raises BackendError with llama_decode's code (1: no room in the cache).
    """
    for start in range(0, len(features), n_batch):
        rows = np.ascontiguousarray(features[start : start + n_batch], dtype=np.float32)
        pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        places = [(sequence, first + start + n) for n in range(len(rows))]
        _decode(context, places, None, pointer, logits)


def decode_tokens(
    context: Any,
    ids: Sequence[int],
    first: int,
    n_batch: int,
    *,
    logits: Logits = "none",
    sequence: int = 0,
) -> None:
    """The same for token ids."""
    from llama_cpp import llama_cpp

    for start in range(0, len(ids), n_batch):
        part = ids[start : start + n_batch]
        tokens = (llama_cpp.llama_token * len(part))(*part)
        places = [(sequence, first + start + n) for n in range(len(part))]
        _decode(context, places, tokens, None, logits)


def decode_next(context: Any, tokens: Sequence[tuple[int, int, int]]) -> None:
    """One token of each (sequence, position, id), in one batch; all get logits. Raises BackendError."""
    from llama_cpp import llama_cpp

    ids = (llama_cpp.llama_token * len(tokens))(*[token for _, _, token in tokens])
    _decode(context, [(sequence, position) for sequence, position, _ in tokens], ids, None, "all")


def _decode(
    context: Any, places: Sequence[tuple[int, int]], tokens: Any, embeddings: Any, logits: Logits
) -> None:
    """places: (sequence, position) of each."""
    from llama_cpp import llama_cpp

    n = len(places)
    sequences = [(llama_cpp.llama_seq_id * 1)(sequence) for sequence, _ in places]
    pointer = ctypes.POINTER(llama_cpp.llama_seq_id)
    arrays = (  # referenced until llama_decode returns
        (llama_cpp.llama_pos * n)(*[position for _, position in places]),
        (ctypes.c_int32 * n)(*[1] * n),
        (pointer * n)(*[ctypes.cast(sequence, pointer) for sequence in sequences]),
        (ctypes.c_int8 * n)(*[int(logits == "all")] * (n - 1), int(logits != "none")),
    )
    batch = llama_cpp.llama_batch(n, tokens, embeddings, *arrays)
    if code := llama_cpp.llama_decode(context, batch):
        raise BackendError(f"llama_decode: code {code} for {n} positions from {places[0][1]}")

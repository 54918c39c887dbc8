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
    context: Any, features: npt.NDArray[np.float32], first: int, n_batch: int, *, logits: Logits = "none"
) -> None:
    """Evaluate (n, n_embd) float32 features at positions first, first + 1, ... of sequence 0.

    They go in one batch unless there are more than n_batch. Attention is causal, as in the reference.
    logits: for which rows the last block and the output are computed; "last" is that of each batch.
    Raises BackendError with llama_decode's code (1: no room in the cache).
    """
    for start in range(0, len(features), n_batch):
        rows = np.ascontiguousarray(features[start : start + n_batch], dtype=np.float32)
        pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        _decode(context, len(rows), first + start, None, pointer, logits)


def decode_tokens(
    context: Any, ids: Sequence[int], first: int, n_batch: int, *, logits: Logits = "none"
) -> None:
    """The same for token ids."""
    from llama_cpp import llama_cpp

    for start in range(0, len(ids), n_batch):
        part = ids[start : start + n_batch]
        tokens = (llama_cpp.llama_token * len(part))(*part)
        _decode(context, len(part), first + start, tokens, None, logits)


def _decode(context: Any, n: int, first: int, tokens: Any, embeddings: Any, logits: Logits) -> None:
    from llama_cpp import llama_cpp

    sequence = (llama_cpp.llama_seq_id * 1)(0)
    pointer = ctypes.POINTER(llama_cpp.llama_seq_id)
    arrays = (  # referenced until llama_decode returns
        (llama_cpp.llama_pos * n)(*range(first, first + n)),
        (ctypes.c_int32 * n)(*[1] * n),
        (pointer * n)(*[ctypes.cast(sequence, pointer)] * n),
        (ctypes.c_int8 * n)(*[int(logits == "all")] * (n - 1), int(logits != "none")),
    )
    batch = llama_cpp.llama_batch(n, tokens, embeddings, *arrays)
    if code := llama_cpp.llama_decode(context, batch):
        raise BackendError(f"llama_decode: code {code} for {n} positions from {first}")

"""Image features -> the KV cache of a llama context. Knows llama_batch and nothing above it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError


def decode_features(context: Any, features: npt.NDArray[np.float32], first: int, n_batch: int) -> None:
    """Evaluate (n, n_embd) float32 features at positions first, first + 1, ... of sequence 0.

    They go in one batch unless there are more than n_batch. Attention is causal, as in the reference.
    Raises BackendError with llama_decode's code (1: no room in the cache).
    """
    for start in range(0, len(features), n_batch):
        part = np.ascontiguousarray(features[start : start + n_batch], dtype=np.float32)
        _decode(context, part, first + start)


def _decode(context: Any, features: npt.NDArray[np.float32], first: int) -> None:
    from llama_cpp import llama_cpp

    n = len(features)
    sequence = (llama_cpp.llama_seq_id * 1)(0)
    pointer = ctypes.POINTER(llama_cpp.llama_seq_id)
    arrays = (  # referenced until llama_decode returns
        (llama_cpp.llama_pos * n)(*range(first, first + n)),
        (ctypes.c_int32 * n)(*[1] * n),
        (pointer * n)(*[ctypes.cast(sequence, pointer)] * n),
        (ctypes.c_int8 * n)(),
    )
    embeddings = features.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    batch = llama_cpp.llama_batch(n, None, embeddings, *arrays)
    if code := llama_cpp.llama_decode(context, batch):
        raise BackendError(f"llama_decode: code {code} for {n} image positions from {first}")

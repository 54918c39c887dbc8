"""llama.cpp's sampler chain on logits of our own choice: some tokens left out, some taken without being sampled.

Knows ctypes and llama_sampler; no grammars. The chain is the one that llama_cpp.Llama.generate samples with.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]
DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Sampler:
    """Chooses a token a step. Repeats itself with its seed."""

    def __init__(self, chain: Any) -> None:
        """chain: llama_cpp's LlamaSampler, which is freed with this object."""
        self._chain = chain

    def choose(self, logits: Logits, allowed: Ids) -> int:
        """One of the allowed ids, by logits (n_vocab,). At least one must be allowed."""
        from llama_cpp import llama_cpp

        data = np.zeros(len(allowed), DATA)
        data["id"], data["logit"] = allowed, logits[allowed]
        array = llama_cpp.llama_token_data_array(
            data=ctypes.cast(data.ctypes.data, ctypes.POINTER(llama_cpp.llama_token_data)),
            size=len(data),
            selected=-1,
            sorted=False,
        )
        llama_cpp.llama_sampler_apply(self._chain.sampler, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        """Count a token that was not sampled, as penalties do."""
        from llama_cpp import llama_cpp

        llama_cpp.llama_sampler_accept(self._chain.sampler, token)

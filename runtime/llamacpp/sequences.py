"""A context of its own on a loaded text model, whose KV cache holds several prompts that are gone on with together.

Knows llama_context and llama_batch; not what the prompts say, nor how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError
from pocketllava.llamacpp.batch import decode_features, decode_next, decode_tokens
from pocketllava.llamacpp.guard import ShouldStop, check_device, interruptible
from pocketllava.llamacpp.private import set_fields
from pocketllava.llamacpp.text_model import Features, TextModel
from pocketllava.models.memory import CONTEXT_STEP


class Sequences:
    """`n` prompts side by side, each with a part of the KV cache to itself. A context manager."""

    def __init__(self, text: TextModel, n: int, n_ctx: int) -> None:
        """n_ctx: at least so many positions for each. Raises BackendError when there is no memory for them."""
        from llama_cpp import llama_cpp

        self._lib, self._text = llama_cpp, text
        self.n, self.n_ctx = n, -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP
        params = text.context_params
        # kv_unified: attention of one sequence would pass over the others' positions
        set_fields(params, n_seq_max=n, n_ctx=n * self.n_ctx, kv_unified=False)
        self._context: Any = text.another_context(params)
        text.adopt(self)
        if not self._context:
            raise BackendError(
                f"llama.cpp: no context for {n} answers at once; use a smaller batch, or free some memory"
            )

    def __enter__(self) -> Sequences:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the context, before the model's weights go (TextModel.close)."""
        context, self._context = self._context, None
        if context:
            self._lib.llama_free(context)

    def truncate(self, sequence: int, n: int) -> None:
        """Keep a sequence's first n positions. Raises BackendError."""
        memory = self._lib.llama_get_memory(self._context)
        if not self._lib.llama_memory_seq_rm(memory, sequence, n, -1):
            raise BackendError(f"KV cache: sequence {sequence} cannot be cut at position {n}")

    def prefill(
        self,
        sequence: int,
        first: int,
        parts: Sequence[list[int] | Features],
        should_stop: ShouldStop | None = None,
    ) -> npt.NDArray[np.float32]:
        """Evaluate ids and (n, n_embd) rows from a position on; the logits after the last, (n_vocab,) float32.

        Raises BackendError, and Interrupted once should_stop() is true.
        """
        rows = [self._text.rows(part) if isinstance(part, list) else part for part in parts]
        whole: list[list[int] | Features] = list(parts)
        if all(part is not None for part in rows):
            whole = [np.concatenate([part for part in rows if part is not None])]
        with interruptible(self._context, should_stop):
            for part in whole:
                decode: Any = decode_tokens if isinstance(part, list) else decode_features
                decode(self._context, part, first, self._text.n_batch, logits="last", sequence=sequence)
                first += len(part)
        logits: npt.NDArray[np.float32] = self._logits(1)[-1]
        return logits

    def step(self, tokens: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.float32]:
        """Evaluate one token of each (sequence, position, id) in one batch; logits, (n, n_vocab) float32.

        Raises BackendError.
        """
        with interruptible(self._context, None):
            decode_next(self._context, tokens)
        return self._logits(len(tokens))

    def _logits(self, n: int) -> npt.NDArray[np.float32]:
        """Of the last n positions that asked for them."""
        logits = np.empty((n, self._text.n_vocab), np.float32)
        for i, row in enumerate(logits):
            row[:] = np.ctypeslib.as_array(self._lib.llama_get_logits_ith(self._context, i - n), row.shape)
        check_device()
        return logits

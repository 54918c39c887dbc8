"""Another context on a loaded text model, whose graphs are watched while it evaluates.

Knows llama_context; what is looked for in a graph is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError
from pocketllava.llamacpp.batch import Logits, decode_features, decode_tokens
from pocketllava.llamacpp.guard import EvalCallback, interruptible
from pocketllava.llamacpp.private import set_fields
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.models.memory import CONTEXT_STEP


class SecondContext:
    """Evaluates prompts beside a TextModel's own context. A context manager."""

    def __init__(
        self, text: TextModel, callback: EvalCallback, *, n_ctx: int | None = None, all_logits: bool = False
    ) -> None:
        """n_ctx: at least so many positions, as many as the model's context unless given.

        all_logits: evaluate the last block and the output at every position. Raises BackendError when there is
        no memory for it.
        """
        from llama_cpp import llama_cpp

        self._lib, self._text, self._callback = llama_cpp, text, callback
        self._logits: Logits = "all" if all_logits else "none"
        params = text.context_params
        size = text.n_ctx if n_ctx is None else -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP
        set_fields(params, n_ctx=size, cb_eval=callback.function, cb_eval_user_data=None)
        self.n_ctx, self._n_batch = int(params.n_ctx), int(params.n_batch)
        self._context: Any = text.another_context(params)
        if not self._context:
            raise BackendError(
                "llama.cpp: no second context could be made; free some memory, or keep layers off the GPU"
                " (n_gpu_layers)"
            )

    def __enter__(self) -> SecondContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lib.llama_free(self._context)
        self._context = None

    def clear(self) -> None:
        """Begin anew at position 0."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def decode_tokens(self, ids: Sequence[int], first: int) -> int:
        """Evaluate ids from that position on; returns the position behind them. Raises BackendError."""
        self._decode(decode_tokens, ids, first)
        return first + len(ids)

    def decode_features(self, features: npt.NDArray[np.float32], first: int) -> int:
        """The same for (n, n_embd) rows."""
        self._decode(decode_features, features, first)
        return first + len(features)

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the next token, (n_vocab,) float32."""
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._text.n_vocab,)).copy()

    def _decode(self, decode: Any, items: Any, first: int) -> None:
        try:
            with interruptible(self._context, None):
                for start in range(0, len(items), self._n_batch):
                    part = items[start : start + self._n_batch]
                    self._callback.begin()
                    decode(self._context, part, first + start, self._n_batch, logits=self._logits)
        finally:
            self._callback.check()

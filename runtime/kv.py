"""The KV cache of a llama_cpp.Llama: what it holds of the last prompt, and how the rest of the next one gets in.

Knows llama_cpp.Llama's record of its tokens, and that others may use the same Llama; no templates, no
image files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.batch import decode_features
from pocketllava.errors import BackendError
from pocketllava.prefix import Entry, n_positions, shared

SNAP = 32  # tokens of text that are rather evaluated again than split into other batches


class KvCache:
    """Remembers what was brought in. For one Llama; it is passed in, so that it can be freed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Count nothing as held."""
        self._prompt: list[Entry] = []
        self._ids: list[int] = []
        self._last_run = 0
        self._array: Any = None
        self._count = 0

    def kept(self, llama: Any, prompt: list[Entry]) -> int:
        """How many entries at the start of a prompt need no evaluation.

        A run of text that would be evaluated from its middle is evaluated from its beginning if that is at
        most SNAP tokens more, and the very same prompt from where its last run began: then batches, and so
        logits, are bit for bit those of the first time, and a seed repeats its answer.
        """
        held = self.held(llama)
        if held and prompt == self._prompt:
            return self._last_run
        kept = shared(held, prompt)
        run = kept
        while run and isinstance(prompt[run - 1], int):
            run -= 1
        return run if kept - run <= SNAP else kept

    def held(self, llama: Any) -> list[Entry]:
        """The last prompt and what was generated after it; nothing if in doubt.

        Token ids alone would not show that others used the Llama, since every picture has the same ones: so
        the cache's length, the count of evaluated tokens and the array itself must agree too.
        """
        from llama_cpp import llama_cpp

        n = len(self._ids)
        generated = llama.n_tokens - n
        memory = llama_cpp.llama_get_memory(llama.ctx)
        untouched = (
            self._prompt
            and llama.input_ids is self._array  # load_state replaces it
            and llama_cpp.llama_memory_seq_pos_max(memory, 0) == llama.n_tokens - 1
            and 0 <= generated - (evaluated_tokens(llama) - self._count) <= 1  # a count of 0 is reported as 1
            and llama.input_ids[:n].tolist() == self._ids
        )
        return [*self._prompt, *llama.input_ids[n : llama.n_tokens].tolist()] if untouched else []

    def fill(
        self,
        llama: Any,
        prompt: list[Entry],
        kept: int,
        features: Mapping[str, npt.NDArray[np.float32]],
        image_id: int,
    ) -> None:
        """Evaluate all but the first `kept` entries of a prompt; image positions are recorded as image_id.

        After a failure nothing counts as held. Raises BackendError, and what llama_cpp raises.
        """
        self.forget()
        first = n_positions(prompt[:kept])
        if not first:
            llama._ctx.kv_cache_clear()
        elif not llama._ctx.kv_cache_seq_rm(-1, first, -1):
            raise BackendError(f"KV cache: cannot be cut at position {first}")
        llama.n_tokens, llama._requires_eval = first, True
        run: list[int] = []
        for n, entry in enumerate([*prompt[kept:], None], kept):
            if isinstance(entry, int):
                run.append(entry)
                continue
            if run:
                llama.eval(run)
                self._last_run, run = n - len(run), []
            if entry is not None:
                _place(llama, features[entry.key], image_id)
        self._prompt, self._ids = prompt, llama.input_ids[: llama.n_tokens].tolist()
        self._array, self._count = llama.input_ids, evaluated_tokens(llama)


def evaluated_tokens(llama: Any) -> int:
    """Tokens and embeddings that the context has evaluated since its timings were reset."""
    from llama_cpp import llama_cpp

    llama_cpp.llama_synchronize(llama.ctx)
    perf = llama_cpp.llama_perf_context(llama.ctx)
    return int(perf.n_p_eval + perf.n_eval)


def _place(llama: Any, features: npt.NDArray[np.float32], image_id: int) -> None:
    first, n = llama.n_tokens, len(features)
    decode_features(llama.ctx, features, first, llama.n_batch)
    llama.input_ids[first : first + n] = image_id
    llama.n_tokens = first + n

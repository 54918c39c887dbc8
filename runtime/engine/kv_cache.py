"""The KV cache of a llama_cpp.Llama: what it holds of the last prompt, and how the rest of the next one gets in.

Knows llama_cpp.Llama's record of its tokens, and that others may use the same Llama; no templates, no
image files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.engine.prefix_cache import Prefixes
from pocketllava.errors import BackendError
from pocketllava.llamacpp.backend import Interrupted, interruptible
from pocketllava.llamacpp.batch import decode_features
from pocketllava.prompt.items import Entry, ImageSpan, image_ends, n_positions, position_ids, shared

SNAP = 32  # tokens of text that are rather evaluated again than split into other batches


class KvCache:
    """Remembers what was brought in. For one Llama; it is passed in, so that it can be freed.

    image_id: the token id that stands for image positions in the Llama's record.
    """

    def __init__(self, image_id: int = 0, prefixes: Prefixes | None = None) -> None:
        self._image_id, self._prefixes = image_id, prefixes or Prefixes()
        self.forget()

    def forget(self) -> None:
        """Count nothing as held. Prefixes that were kept stay."""
        self._prompt: list[Entry] = []
        self._ids: list[int] = []
        self._last_run = 0
        self._array: Any = None
        self._count = 0

    def keep(self, llama: Any, prompt: list[Entry], *, to_sample: bool = True) -> int:
        """Make the cache hold what is known of a prompt; returns how many entries need no evaluation.

        What the cache holds is used, or an image prefix that was kept, whichever is longer. An image that
        gets lost is kept as a prefix first. to_sample: evaluate the last entry in any case, because its
        logits are what sampling needs.
        """
        held = self.held(llama)
        kept = self._reusable(held, prompt, to_sample)
        if kept == len(prompt):  # and the text behind it stays, too
            return kept
        restorable = self._prefixes.longest(prompt)
        self._save_images(llama, held, kept)
        if restorable <= kept:
            return kept
        self.forget()
        if (restored := self._prefixes.restore(llama, prompt[:restorable])) is None:
            return 0
        self._record(llama, restored)
        return restorable

    def _reusable(self, held: list[Entry], prompt: list[Entry], to_sample: bool) -> int:
        """Entries that the cache holds, of which text in the middle of a run counts only where it saves much.

        A run of text that would be evaluated from its middle is evaluated from its beginning if that is at
        most SNAP tokens more, and the very same prompt from where its last run began: then batches, and so
        logits, are bit for bit those of the first time, and a seed repeats its answer.
        """
        kept = shared(held, prompt)
        if kept == len(prompt) and not to_sample:
            return kept
        if held and prompt == self._prompt:
            return self._last_run
        kept = run = min(kept, len(prompt) - 1)
        while run and isinstance(prompt[run - 1], int):
            run -= 1
        return run if kept - run <= SNAP else kept

    def _save_images(self, llama: Any, held: list[Entry], kept: int) -> None:
        """Before entries beyond `kept` are lost: keep the state up to the last image among them."""
        end = next(iter(image_ends(held)), 0)
        if end > kept:
            self._cut(llama, held[:end])
            self._prefixes.save(llama, held[:end])

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
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """Evaluate all but the first `kept` entries of a prompt, which the cache holds.

        Once stop() is true it ends with Interrupted, and the cache holds those first entries; after any
        other failure nothing counts as held. Raises BackendError, and what llama_cpp raises.
        """
        if kept == len(prompt):
            return
        self._cut(llama, prompt[:kept])
        self.forget()
        try:
            with interruptible(llama.ctx, stop):
                self._evaluate(llama, prompt, kept, features)
        except Interrupted:
            self._cut(llama, prompt[:kept])
            raise
        self._record(llama, prompt)

    def _evaluate(
        self, llama: Any, prompt: list[Entry], kept: int, features: Mapping[str, npt.NDArray[np.float32]]
    ) -> None:
        last_image = next(iter(image_ends(prompt)), 0)
        run: list[int] = []
        for n, entry in enumerate([*prompt[kept:], None], kept):
            if isinstance(entry, int):
                run.append(entry)
                continue
            if run:
                llama.eval(run)
                self._last_run, run = n - len(run), []
            if isinstance(entry, ImageSpan):
                self._place(llama, features[entry.key])
                if n + 1 == last_image:
                    self._prefixes.write(llama, prompt[: n + 1])

    def _place(self, llama: Any, features: npt.NDArray[np.float32]) -> None:
        first, n = llama.n_tokens, len(features)
        decode_features(llama.ctx, features, first, llama.n_batch)
        llama.input_ids[first : first + n] = self._image_id
        llama.n_tokens = first + n

    def _cut(self, llama: Any, entries: list[Entry]) -> None:
        """Drop everything behind these entries, with which the cache begins."""
        n = n_positions(entries)
        if not n:
            llama._ctx.kv_cache_clear()
        elif not llama._ctx.kv_cache_seq_rm(-1, n, -1):
            raise BackendError(f"KV cache: cannot be cut at position {n}")
        llama._requires_eval = True
        self._record(llama, entries)

    def _record(self, llama: Any, entries: list[Entry]) -> None:
        ids = position_ids(entries, self._image_id)
        llama.input_ids[: len(ids)] = ids
        llama.n_tokens = len(ids)
        self._prompt, self._ids = entries, ids
        self._array, self._count = llama.input_ids, evaluated_tokens(llama)


def evaluated_tokens(llama: Any) -> int:
    """Tokens and embeddings that the context has evaluated since its timings were reset."""
    from llama_cpp import llama_cpp

    llama_cpp.llama_synchronize(llama.ctx)
    perf = llama_cpp.llama_perf_context(llama.ctx)
    return int(perf.n_p_eval + perf.n_eval)

"""The KV cache: what it holds of the last prompt, and how the rest of the next one gets in.

Knows prompt items and a TextModel; no templates, no image files. It is the only record of what the cache
holds: images are known by their content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from pocketllava.engine.prefix_cache import PrefixCache
from pocketllava.llamacpp.guard import Interrupted, ShouldStop
from pocketllava.llamacpp.text_model import Mark, TextModel
from pocketllava.prompt.items import (
    ImageSpan,
    PromptItem,
    last_image_end,
    n_positions,
    position_ids,
    runs,
    shared,
)
from pocketllava.types import OnProgress, Progress


class KvCache:
    """What one TextModel's KV cache holds.

    image_id: the token id that stands for image positions in llama_cpp's record.
    """

    def __init__(self, text: TextModel, image_id: int = 0, prefixes: PrefixCache | None = None) -> None:
        self._text, self._image_id = text, image_id
        self._prefixes = PrefixCache() if prefixes is None else prefixes
        # Whether the context has a row of logits, the last prompt's or of what was generated after it.
        self._has_row = False
        self.clear()

    def clear(self) -> None:
        """Count nothing as held. Prefixes that were kept stay."""
        self._prompt: list[PromptItem] = []
        self._mark: Mark | None = None
        self._logits: npt.NDArray[np.float32] | None = None  # of the token after the prompt

    def contents(self) -> list[PromptItem]:
        """The last prompt and what was generated after it; nothing if others may have used the model."""
        if self._mark is None or not self._prompt:
            return []
        generated = self._text.ids_since(self._mark, position_ids(self._prompt, self._image_id))
        return [] if generated is None else [*self._prompt, *generated]

    def reuse(self, prompt: list[PromptItem], *, to_sample: bool = True) -> int:
        """Make the cache hold what is known of a prompt; returns how many items need no evaluation.

        What the cache holds is used, or a conversation that was kept, whichever has more of the prompt. A conversation
        whose image gets lost is kept first. to_sample: evaluate the last item in any case, because its logits are what
        sampling needs.
        """
        contents = self.contents()
        n_reused = self._reusable(contents, prompt, to_sample)
        if n_reused == len(prompt):
            if to_sample:
                self._repeat(prompt)
            return n_reused  # else the text behind it stays, too
        n_kept, has_row = self._prefixes.longest(prompt), bool(contents) and self._has_row
        kept = self._prefixes.take(prompt[:n_kept]) if n_kept > n_reused else None
        self._keep(contents, n_reused)
        if kept is None:
            return n_reused
        self.clear()
        if not self._text.restore(kept.state, n_positions(kept.items)):
            self._prefixes.discard(kept)
            return 0
        self._remember(kept.items)
        if to_sample and has_row and kept.logits is not None and prompt == kept.items[: kept.n_prompt]:
            self._logits = kept.logits
            self._repeat(prompt)
            return n_kept
        return self._reusable(kept.items, prompt, to_sample)

    def _reusable(self, contents: list[PromptItem], prompt: list[PromptItem], to_sample: bool) -> int:
        """Items that the cache holds: what both prompts begin with.

        Of the very same prompt the logits are known, too, and a seed repeats its answer bit for bit. Elsewhere
        logits agree within rounding, because a batch's size decides on the order of its sums.
        """
        n = shared(contents, prompt)
        known = not to_sample or (self._logits is not None and prompt == self._prompt)
        return n if known else min(n, len(prompt) - 1)

    def _repeat(self, prompt: list[PromptItem]) -> None:
        """Forget what was generated after a prompt, and sample from its logits again."""
        logits = self._logits
        assert logits is not None
        self._truncate(prompt)
        self._text.restore_logits(logits)
        self._logits = logits

    def _keep(self, contents: list[PromptItem], n_reused: int) -> None:
        """Before items beyond n_reused are lost: keep the conversation if its last image is among them.

        Where the whole of it is too large, it is kept up to that image.
        """
        end = last_image_end(contents)
        if end <= n_reused:
            return
        if not self._prefixes.save(self._text, contents, len(self._prompt), self._logits):
            self._truncate(contents[:end])
            self._prefixes.save(self._text, contents[:end])

    def decode(
        self,
        prompt: list[PromptItem],
        n_reused: int,
        features: Mapping[str, npt.NDArray[np.float32]],
        should_stop: ShouldStop | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Evaluate all but the first n_reused items of a prompt, which the cache holds.

        features: (n_tokens, n_embd) by image key. Once should_stop() is true it ends with Interrupted, and the
        cache holds those first items; after any other failure nothing counts as held. Raises BackendError,
        and what llama_cpp raises.
        """
        if n_reused == len(prompt):
            return
        self._truncate(prompt[:n_reused])
        self.clear()
        self._has_row = False
        first, last = self._text.n_tokens, n_positions(prompt)

        def report() -> None:
            if on_progress is not None:
                on_progress(Progress("prompt", self._text.n_tokens - first, last - first))

        try:
            with self._text.interruptible(should_stop):
                report()
                self._evaluate(prompt, n_reused, features, report)
                report()
        except Interrupted:
            self._truncate(prompt[:n_reused])
            raise
        self._remember(prompt)
        self._has_row = isinstance(prompt[-1], int)
        if self._has_row:
            self._logits = self._text.logits()

    @contextmanager
    def prompt_kept(self) -> Iterator[None]:
        """The block may evaluate more behind the prompt; after it the cache holds the prompt alone."""
        try:
            yield
        finally:
            if self._logits is None:
                self._truncate(self._prompt)
            else:
                self._repeat(self._prompt)

    def _evaluate(
        self,
        prompt: list[PromptItem],
        n_reused: int,
        features: Mapping[str, npt.NDArray[np.float32]],
        report: Callable[[], None],
    ) -> None:
        """A prefix that goes to disk ends at its last image, so that what follows is evaluated after it."""
        end = last_image_end(prompt)
        if end <= n_reused or not self._prefixes.on_disk:
            self._evaluate_items(prompt[n_reused:], features)
            return
        self._evaluate_items(prompt[n_reused:end], features)
        report()
        self._prefixes.write(self._text, prompt[:end])
        self._evaluate_items(prompt[end:], features)

    def _evaluate_items(
        self, items: list[PromptItem], features: Mapping[str, npt.NDArray[np.float32]]
    ) -> None:
        parts = [features[part.key] if isinstance(part, ImageSpan) else part for part in runs(items)]
        if len(parts) == 1 and isinstance(parts[0], list):
            self._text.decode_tokens(parts[0])
        elif parts:
            self._text.decode_mixed(parts, self._image_id)

    def _truncate(self, items: list[PromptItem]) -> None:
        """Drop everything behind these items, with which the cache begins."""
        self._text.truncate(n_positions(items))
        self._remember(items)

    def _remember(self, items: list[PromptItem]) -> None:
        self._text.record(position_ids(items, self._image_id))
        self._prompt, self._mark, self._logits = items, self._text.mark(), None

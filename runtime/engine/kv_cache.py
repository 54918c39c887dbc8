"""The KV cache: what it holds of the last prompt, and how the rest of the next one gets in.

Knows prompt items and a TextModel; no templates, no image files. It is the only record of what the cache
holds: images are known by their content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from pocketllava.engine.prefix_cache import PrefixCache
from pocketllava.llamacpp.guard import Interrupted, ShouldStop
from pocketllava.llamacpp.text_model import Mark, TextModel
from pocketllava.prompt.items import (
    ImageSpan,
    PromptItem,
    image_ends,
    n_positions,
    position_ids,
    runs,
    shared,
)


class KvCache:
    """What one TextModel's KV cache holds.

    image_id: the token id that stands for image positions in llama_cpp's record.
    """

    def __init__(self, text: TextModel, image_id: int = 0, prefixes: PrefixCache | None = None) -> None:
        self._text, self._image_id, self._prefixes = text, image_id, prefixes or PrefixCache()
        self.clear()

    def clear(self) -> None:
        """Count nothing as held. Prefixes that were kept stay."""
        self._prompt: list[PromptItem] = []
        self._mark: Mark | None = None
        self._last_run = 0  # where the prompt's last run of text began to be evaluated

    def contents(self) -> list[PromptItem]:
        """The last prompt and what was generated after it; nothing if others may have used the model."""
        if self._mark is None or not self._prompt:
            return []
        generated = self._text.ids_since(self._mark, position_ids(self._prompt, self._image_id))
        return [] if generated is None else [*self._prompt, *generated]

    def reuse(self, prompt: list[PromptItem], *, to_sample: bool = True) -> int:
        """Make the cache hold what is known of a prompt; returns how many items need no evaluation.

        What the cache holds is used, or an image prefix that was kept, whichever is longer. An image that
        gets lost is kept as a prefix first. to_sample: evaluate the last item in any case, because its
        logits are what sampling needs.
        """
        contents = self.contents()
        n_reused = self._reusable(contents, prompt, to_sample)
        if n_reused == len(prompt):  # and the text behind it stays, too
            return n_reused
        n_restorable = self._prefixes.longest(prompt)
        self._save_images(contents, n_reused)
        if n_restorable <= n_reused:
            return n_reused
        self.clear()
        if (restored := self._prefixes.restore(self._text, prompt[:n_restorable])) is None:
            return 0
        self._remember(restored)
        return n_restorable

    def _reusable(self, contents: list[PromptItem], prompt: list[PromptItem], to_sample: bool) -> int:
        """Items that the cache holds: what both prompts begin with.

        The very same prompt is evaluated again from where its last run began: then batches, and so logits, are bit for
        bit those of the first time, and a seed repeats its answer. Elsewhere logits agree within rounding.
        """
        n = shared(contents, prompt)
        if n == len(prompt) and not to_sample:
            return n
        if contents and prompt == self._prompt:
            return self._last_run
        return min(n, len(prompt) - 1)

    def _save_images(self, contents: list[PromptItem], n_reused: int) -> None:
        """Before items beyond n_reused are lost: keep the state up to the last image among them."""
        end = next(iter(image_ends(contents)), 0)
        if end > n_reused:
            self._truncate(contents[:end])
            self._prefixes.save(self._text, contents[:end])

    def decode(
        self,
        prompt: list[PromptItem],
        n_reused: int,
        features: Mapping[str, npt.NDArray[np.float32]],
        should_stop: ShouldStop | None = None,
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
        try:
            with self._text.interruptible(should_stop):
                self._evaluate(prompt, n_reused, features)
        except Interrupted:
            self._truncate(prompt[:n_reused])
            raise
        self._remember(prompt)

    @contextmanager
    def prompt_kept(self) -> Iterator[None]:
        """The block may evaluate more behind the prompt; after it the cache holds the prompt alone."""
        try:
            yield
        finally:
            self._truncate(self._prompt)

    def _evaluate(
        self, prompt: list[PromptItem], n_reused: int, features: Mapping[str, npt.NDArray[np.float32]]
    ) -> None:
        last_image = next(iter(image_ends(prompt)), 0)
        at = n_reused
        for part in runs(prompt[n_reused:]):
            if isinstance(part, ImageSpan):
                self._text.decode_features(features[part.key], self._image_id)
                at += 1
                if at == last_image:
                    self._prefixes.write(self._text, prompt[:at])
            else:
                self._text.decode_tokens(part)
                self._last_run = at
                at += len(part)

    def _truncate(self, items: list[PromptItem]) -> None:
        """Drop everything behind these items, with which the cache begins."""
        self._text.truncate(n_positions(items))
        self._remember(items)

    def _remember(self, items: list[PromptItem]) -> None:
        self._text.record(position_ids(items, self._image_id))
        self._prompt, self._mark = items, self._text.mark()

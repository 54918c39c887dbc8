"""Evaluated image prefixes: a prompt up to an image's end -> llama.cpp's state of the sequence, to come back to.

A few are kept in memory, least recently used first out; with a blob cache also on disk. llama.cpp trusts what
it is told to restore: what comes from disk is bound by its name to the model, the settings and the
library, and hashed (models/blob_cache.py). Knows prompt items; not when to save or restore.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from pocketllava.llamacpp.text_model import State, TextModel
from pocketllava.models.blob_cache import BlobCache
from pocketllava.prompt.items import PromptItem, image_ends, n_positions

MAX_COUNT = 2  # 0.3 GB each for an image on a 7B model


@dataclass(eq=False)
class Prefix:
    """Items at the start of a prompt, the last one an image, and the state after them."""

    items: list[PromptItem]
    state: State


class PrefixCache:
    """States of one TextModel. `settings` names everything that a state on disk depends on."""

    def __init__(
        self, max_count: int = MAX_COUNT, store: BlobCache | None = None, settings: str = ""
    ) -> None:
        self.max_count = max_count
        self._prefixes: list[Prefix] = []  # the one used last stands last
        self._store, self._settings = store, settings

    @property
    def on_disk(self) -> bool:
        """Whether states are kept on disk, too."""
        return self._store is not None

    def clear(self) -> None:
        """Forget the states in memory; those on disk stay."""
        self._prefixes.clear()

    def longest(self, prompt: list[PromptItem]) -> int:
        """How many items at a prompt's start can be restored: up to the end of one of its images, or 0."""
        for n in image_ends(prompt):
            if self._find(prompt[:n]) or (self._store and self._store.has(self._name(prompt[:n]))):
                return n
        return 0

    def save(self, text: TextModel, items: list[PromptItem]) -> None:
        """Keep in memory what the KV cache holds, which is these items, unless that is kept already."""
        if self.max_count and not self._find(items):
            others = [p for p in self._prefixes if items[: len(p.items)] != p.items]
            self._prefixes = [*others, Prefix(items, text.state())][-self.max_count :]

    def write(self, text: TextModel, items: list[PromptItem]) -> None:
        """Keep on disk what the KV cache holds, if there is a blob cache."""
        if self._store and not self._store.has(self._name(items)):
            self._store.put(self._name(items), text.state())

    def restore(self, text: TextModel, items: list[PromptItem]) -> list[PromptItem] | None:
        """Put a state that begins with these items into the KV cache; returns what the cache then holds.

        None if there is none, or llama.cpp refused it; then the cache's content is undefined.
        """
        if prefix := self._find(items):
            self._prefixes.remove(prefix)
            self._prefixes.append(prefix)
            return prefix.items if text.restore(prefix.state, n_positions(prefix.items)) else None
        data = self._store.get(self._name(items)) if self._store else None
        if data is None:
            return None
        if not text.restore(np.frombuffer(data, np.uint8), n_positions(items)):
            assert self._store is not None
            self._store.discard(self._name(items))
            return None
        return items

    def _find(self, items: list[PromptItem]) -> Prefix | None:
        return next((p for p in self._prefixes if p.items[: len(items)] == items), None)

    def _name(self, items: list[PromptItem]) -> str:
        keys = [item if isinstance(item, int) else [item.key, item.n_tokens] for item in items]
        return hashlib.sha256(json.dumps([self._settings, keys]).encode()).hexdigest() + ".prefix"

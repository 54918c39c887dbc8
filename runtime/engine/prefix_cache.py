"""Evaluated conversations that show an image: a prompt's items -> llama.cpp's state after them, to come back to.

A few are kept in memory, least recently used first out; with a blob cache also on disk, up to their last image.
llama.cpp trusts what it is told to restore: what comes from disk is bound by its name to the model, the settings and
the library, and hashed (models/blob_cache.py). Knows prompt items; not when to save or restore.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketllava.llamacpp.text_model import State, TextModel
from pocketllava.models.blob_cache import BlobCache
from pocketllava.models.plan import MAX_KEPT
from pocketllava.prompt.items import PromptItem, image_ends, last_image_end, shared

MAX_BYTES = 1 << 30  # unless the plan says how many


@dataclass(eq=False)
class Prefix:
    """Items at the start of a conversation, and the state after them.

    logits: of the first n_prompt items, the last prompt, (n_vocab,); the rest was sampled from them. None: not known.
    """

    items: list[PromptItem]
    state: State
    n_prompt: int = 0
    logits: npt.NDArray[np.float32] | None = None

    @property
    def to_image(self) -> list[PromptItem]:
        """The items up to the end of the last image."""
        return self.items[: last_image_end(self.items)]

    def shares(self, prompt: Sequence[PromptItem]) -> int:
        """How many items a prompt begins with, too; 0 where that is text alone, which is soon evaluated."""
        n = shared(self.items, prompt)
        return n if image_ends(self.items[:n]) else 0


class PrefixCache:
    """States of one TextModel, max_bytes of them. `settings` names everything that a state on disk depends on."""

    def __init__(
        self, max_bytes: int = MAX_BYTES, store: BlobCache | None = None, settings: str = ""
    ) -> None:
        self.max_bytes = max_bytes
        self._prefixes: list[Prefix] = []  # the one used last stands last
        self._store, self._settings = store, settings

    @property
    def on_disk(self) -> bool:
        """Whether states are kept on disk, too."""
        return self._store is not None

    def __len__(self) -> int:
        """States in memory."""
        return len(self._prefixes)

    @property
    def n_bytes(self) -> int:
        """Bytes of the states in memory."""
        return sum(len(prefix.state) for prefix in self._prefixes)

    def clear(self) -> None:
        """Forget the states in memory; those on disk stay."""
        self._prefixes.clear()

    def longest(self, prompt: list[PromptItem]) -> int:
        """How many items at a prompt's start can be restored, an image among them; 0 for none."""
        n = max((prefix.shares(prompt) for prefix in self._prefixes), default=0)
        on_disk = (
            end for end in image_ends(prompt) if self._store and self._store.has(self._name(prompt[:end]))
        )
        return max(n, next(on_disk, 0))

    def save(
        self,
        text: TextModel,
        items: list[PromptItem],
        n_prompt: int = 0,
        logits: npt.NDArray[np.float32] | None = None,
    ) -> bool:
        """Keep in memory what the KV cache holds, which is these items; False if it is larger than all the room.

        A conversation takes the place of another one that shows its images and no others.
        """
        n_bytes = text.state_bytes()
        if n_bytes > self.max_bytes:
            return False
        self._prefixes = [p for p in self._prefixes if items[: len(p.to_image)] != p.to_image]
        while self._prefixes and (self.n_bytes + n_bytes > self.max_bytes or len(self._prefixes) >= MAX_KEPT):
            self._prefixes.pop(0)  # before the new one is made: both together could be too much
        self._prefixes.append(Prefix(items, text.state(), n_prompt, logits))
        return True

    def write(self, text: TextModel, items: list[PromptItem]) -> None:
        """Keep on disk what the KV cache holds, if there is a blob cache."""
        if self._store and not self._store.has(self._name(items)):
            self._store.put(self._name(items), text.state())

    def take(self, items: list[PromptItem]) -> Prefix | None:
        """A state that begins with these items, to be restored; gone from memory then, unless it shows more images.

        The KV cache will hold it, and gives it back to save() before it is lost: so one state more can be kept.
        """
        if prefix := next((p for p in self._prefixes if p.items[: len(items)] == items), None):
            self._prefixes.remove(prefix)
            if len(prefix.to_image) > len(items):
                self._prefixes.append(prefix)
            return prefix
        data = self._store.get(self._name(items)) if self._store else None
        return None if data is None else Prefix(items, np.frombuffer(data, np.uint8))

    def discard(self, prefix: Prefix) -> None:
        """Forget a state that llama.cpp refused."""
        if prefix in self._prefixes:
            self._prefixes.remove(prefix)
        if self._store:
            self._store.discard(self._name(prefix.items))

    def _name(self, items: list[PromptItem]) -> str:
        keys = [item if isinstance(item, int) else [item.key, item.n_tokens] for item in items]
        return hashlib.sha256(json.dumps([self._settings, keys]).encode()).hexdigest() + ".prefix"

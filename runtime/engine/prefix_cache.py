"""Evaluated image prefixes: a prompt up to an image's end -> llama.cpp's state of the sequence, to come back to.

A few are kept in memory, least recently used first out; with a Store also on disk. llama.cpp trusts what
it is told to restore: what comes from disk is bound by its name to the model, the settings and the
library, and hashed (blob_cache.py). Knows entries and llama_state_seq_*; not when to save or restore.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.models.blob_cache import Store
from pocketllava.prompt.items import Entry, image_ends, n_positions

MAX_COUNT = 2  # 0.3 GB each for an image on a 7B model
State = npt.NDArray[np.uint8]


@dataclass(eq=False)
class Kept:
    """Entries at the start of a prompt, the last one an image, and the state after them."""

    entries: list[Entry]
    state: State


class Prefixes:
    """States of one llama_cpp.Llama. `settings` names everything that a state on disk depends on."""

    def __init__(self, max_count: int = MAX_COUNT, store: Store | None = None, settings: str = "") -> None:
        self.max_count = max_count
        self._kept: list[Kept] = []  # the one used last stands last
        self._store, self._settings = store, settings

    def longest(self, prompt: list[Entry]) -> int:
        """How many entries at a prompt's start can be restored: up to the end of one of its images, or 0."""
        for n in image_ends(prompt):
            if self._find(prompt[:n]) or (self._store and self._store.has(self._name(prompt[:n]))):
                return n
        return 0

    def save(self, llama: Any, entries: list[Entry]) -> None:
        """Keep in memory what the KV cache holds, which is these entries, unless that is kept already."""
        if self.max_count and not self._find(entries):
            others = [kept for kept in self._kept if entries[: len(kept.entries)] != kept.entries]
            self._kept = [*others, Kept(entries, _state_of(llama))][-self.max_count :]

    def write(self, llama: Any, entries: list[Entry]) -> None:
        """Keep on disk what the KV cache holds, if there is a store."""
        if self._store and not self._store.has(self._name(entries)):
            self._store.put(self._name(entries), _state_of(llama))

    def restore(self, llama: Any, entries: list[Entry]) -> list[Entry] | None:
        """Put a state that begins with these entries into the KV cache; returns what the cache then holds.

        None if there is none, or llama.cpp refused it; then the cache's content is undefined.
        """
        if found := self._find(entries):
            self._kept.remove(found)
            self._kept.append(found)
            return found.entries if _restored(llama, found.state, n_positions(found.entries)) else None
        data = self._store.get(self._name(entries)) if self._store else None
        if data is None:
            return None
        if not _restored(llama, np.frombuffer(data, np.uint8), n_positions(entries)):
            assert self._store is not None
            self._store.discard(self._name(entries))
            return None
        return entries

    def _find(self, entries: list[Entry]) -> Kept | None:
        return next((kept for kept in self._kept if kept.entries[: len(entries)] == entries), None)

    def _name(self, entries: list[Entry]) -> str:
        keys = [entry if isinstance(entry, int) else [entry.key, entry.n_positions] for entry in entries]
        return hashlib.sha256(json.dumps([self._settings, keys]).encode()).hexdigest() + ".prefix"


def _state_of(llama: Any) -> State:
    from llama_cpp import llama_cpp

    n_bytes = llama_cpp.llama_state_seq_get_size(llama.ctx, 0)
    state = np.empty(n_bytes, np.uint8)
    written = llama_cpp.llama_state_seq_get_data(llama.ctx, _bytes_of(state), n_bytes, 0)
    return state[:written]


def _restored(llama: Any, state: State, positions: int) -> bool:
    from llama_cpp import llama_cpp

    llama._ctx.kv_cache_clear()
    memory = llama_cpp.llama_get_memory(llama.ctx)
    return bool(
        llama_cpp.llama_state_seq_set_data(llama.ctx, _bytes_of(state), len(state), 0) == len(state)
        and llama_cpp.llama_memory_seq_pos_min(memory, 0) == 0
        and llama_cpp.llama_memory_seq_pos_max(memory, 0) == positions - 1
    )


def _bytes_of(state: State) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))

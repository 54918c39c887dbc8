"""Features of images, or of tiles, that were computed already: in memory, the last used ones, and in a BlobCache.

Knows arrays and their keys; no engine.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from pocketllava.models.blob_cache import BlobCache

Features = npt.NDArray[np.float32]
MAX_BYTES = 128 << 20  # thirteen images, or tiles, of a 7B model


class FeatureCache:
    """Key -> (n_tokens, n_embd) float32. With a store, rounded to F16, so that it never matters who encoded."""

    def __init__(self, max_bytes: int = MAX_BYTES, store: BlobCache | None = None) -> None:
        self.max_bytes, self.n_bytes = max_bytes, 0
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self._store = store

    def get(self, key: str, shape: tuple[int, int]) -> Features | None:
        """The features, if they are kept; they count as used now."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        stored = self._store.get(_name(key)) if self._store else None
        if stored is None or len(stored) != 2 * shape[0] * shape[1]:
            return None
        features = np.frombuffer(stored, "<f2").reshape(shape).astype(np.float32)
        self._keep(key, features)
        return features

    def put(self, key: str, features: Features) -> Features:
        """Keep features; returns them as get() will."""
        if self._store:
            with np.errstate(over="ignore"):
                rounded = features.astype("<f2")
            if np.isfinite(rounded).all():  # beyond 65504 F16 has no numbers
                self._store.put(_name(key), rounded)
                features = rounded.astype(np.float32)
        self._keep(key, features)
        return features

    def _keep(self, key: str, features: Features) -> None:
        if key in self._kept:
            self.n_bytes -= self._kept.pop(key).nbytes
        self._kept[key] = features
        self.n_bytes += features.nbytes
        while self.n_bytes > self.max_bytes and self._kept:
            self.n_bytes -= self._kept.popitem(last=False)[1].nbytes


def _name(key: str) -> str:
    return key + ".features"

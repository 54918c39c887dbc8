"""Image features that were computed already, least recently used first out, bounded in bytes. Knows arrays only."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

MAX_BYTES = 64 << 20  # six images of a 7B model


def key_of(pixels: npt.NDArray[np.uint8]) -> str:
    """SHA-256 of prepared pixels: what tells one picture from another."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


class FeatureCache:
    """Key -> (n_patches, n_embd) float32."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes, self.n_bytes = max_bytes, 0
        self._kept: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()

    def get(self, key: str) -> npt.NDArray[np.float32] | None:
        """The features, if they are kept; they count as used now."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: str, features: npt.NDArray[np.float32]) -> None:
        """Keep features, dropping the least recently used ones beyond max_bytes."""
        if key in self._kept:
            self.n_bytes -= self._kept.pop(key).nbytes
        self._kept[key] = features
        self.n_bytes += features.nbytes
        while self.n_bytes > self.max_bytes and self._kept:
            self.n_bytes -= self._kept.popitem(last=False)[1].nbytes

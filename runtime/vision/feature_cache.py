"""Features of images, or of tiles, that were computed already: in memory, the last used ones, and in a BlobCache.

Knows arrays and their keys; no engine.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from pocketllava.models.blob_cache import BlobCache

Features = npt.NDArray[np.float32]
Order = npt.NDArray[np.int16]  # patches of a tile, best first
MAX_ORDERS = 1024  # 1.2 kB each
MAX_COUNT = 256  # of a small model's, of which 128 MB would be thousands: a long run's memory stays flat
MAX_BYTES = 128 << 20  # thirteen images, or tiles, of a 7B model


class FeatureCache:
    """Key -> (n_tokens, n_embd) float32. With a store, rounded to F16, so that it never matters who encoded."""

    def __init__(self, max_bytes: int = MAX_BYTES, store: BlobCache | None = None) -> None:
        self.max_bytes, self.n_bytes = max_bytes, 0
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self._orders: OrderedDict[str, Order] = OrderedDict()
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

    def order(self, key: str, n: int, n_patches: int) -> Order | None:
        """The order of n of a tile's n_patches that was kept under a key."""
        if (
            key not in self._orders
            and self._store
            and (stored := self._store.get(key + ".order")) is not None
        ):
            order = (
                np.frombuffer(stored, "<i2").astype(np.int16)
                if len(stored) % 2 == 0
                else np.empty(0, np.int16)
            )
            if len(order) == n == len(np.unique(order)) and order.min() >= 0 and order.max() < n_patches:
                self._keep_order(key, order)
        return self._orders.get(key)

    def put_order(self, key: str, order: Order) -> None:
        """Keep an order of patches."""
        if self._store:
            self._store.put(key + ".order", order.astype("<i2"))
        self._keep_order(key, order)

    def _keep_order(self, key: str, order: Order) -> None:
        self._orders[key] = order
        while len(self._orders) > MAX_ORDERS:
            self._orders.popitem(last=False)

    def _keep(self, key: str, features: Features) -> None:
        if key in self._kept:
            self.n_bytes -= self._kept.pop(key).nbytes
        self._kept[key] = features
        self.n_bytes += features.nbytes
        while (self.n_bytes > self.max_bytes or len(self._kept) > MAX_COUNT) and self._kept:
            self.n_bytes -= self._kept.popitem(last=False)[1].nbytes


def _name(key: str) -> str:
    return key + ".features"

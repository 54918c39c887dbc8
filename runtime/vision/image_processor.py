"""An image's source -> its prepared pixels and its key, decoded once for as long as they are remembered.

Every turn of a conversation shows all of its pictures again: a file is known by its size, inode and time of
change, then by its bytes. Knows sources, Preprocessing and Pillow's pixels; no model.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from pocketllava.errors import ImageError
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.types import ImageSource
from pocketllava.vision import sources
from pocketllava.vision.decoding import MAX_PIXELS, pillow_errors
from pocketllava.vision.image import Pixels, check_pixels, prepare

REMEMBERED = 16  # pictures, 0.3 MB each at 336 x 336 pixels: few conversations show more
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """What the vision tower is shown, (crop_size, crop_size, 3) uint8, and what tells it from other pictures."""

    pixels: Pixels
    key: str


class ImageProcessor:
    """Prepares images as one checkpoint's own processor does. Threads may share it."""

    def __init__(
        self, preprocessing: Preprocessing, *, max_pixels: int = MAX_PIXELS, encoder: str = ""
    ) -> None:
        """encoder: names what will encode the pixels, so that keys of different towers differ."""
        self.preprocessing, self.max_pixels, self._encoder = preprocessing, max_pixels, encoder
        self._digests: _Recent[sources.FileState | str, str] = _Recent(4 * REMEMBERED)
        self._images: _Recent[str, PreparedImage] = _Recent(REMEMBERED)

    def process(self, source: ImageSource) -> PreparedImage:
        """Decode, resize and crop, unless that was done for the same content. Raises ImageError."""
        identity, digest = self._known(source)
        if digest is not None and (image := self._images.get(digest)) is not None:
            return image
        content, digest = self._read(source, identity)
        if (image := self._images.get(digest)) is None:
            pixels = prepare(content, sources.name_of(source), self.preprocessing, self.max_pixels)
            image = PreparedImage(pixels, key_of(pixels, self._encoder))
            self._images.put(digest, image)
        return image

    def digest(self, source: ImageSource) -> str | None:
        """What tells a source's content from any other, or None where it cannot be read."""
        identity, digest = self._known(source)
        try:
            return digest or self._read(source, identity)[1]
        except ImageError:
            return None

    def _read(
        self, source: ImageSource, identity: sources.FileState | str | None
    ) -> tuple[sources.Content, str]:
        """A source's content and its digest, which is remembered for its identity. Raises ImageError."""
        content, name = sources.read(source), sources.name_of(source)
        check_pixels(content, name, self.max_pixels)
        with pillow_errors(name):  # a lazily opened picture is decoded here
            digest = sources.digest(content)
        if identity is not None:
            self._digests.put(identity, digest)
        return content, digest

    def _known(self, source: ImageSource) -> tuple[sources.FileState | str | None, str | None]:
        """A source's identity before it is read, and the digest of its content if it was read before."""
        identity = sources.identity(source)
        return identity, self._digests.get(identity) if identity is not None else None


def key_of(pixels: Pixels, encoder: str = "") -> str:
    """SHA-256 of what encodes an image and of its prepared pixels: what tells one picture from another."""
    digest = hashlib.sha256(encoder.encode() + b"\0")
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


class _Recent(Generic[K, V]):
    """The entries used last. Thread-safe."""

    def __init__(self, max_count: int) -> None:
        self._max_count, self._lock = max_count, threading.Lock()
        self._entries: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            while len(self._entries) > self._max_count:
                self._entries.popitem(last=False)

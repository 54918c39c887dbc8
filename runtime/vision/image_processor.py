"""An image's source -> its tiles' pixels, its key and its count of tokens, decoded once while it is remembered.

Every turn of a conversation shows all of its pictures again: a file is known by its size, inode and time of
change, then by its bytes. Knows sources, Preprocessing and Pillow's pixels; no model.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from pocketllava.errors import ImageError
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.models.tiling import Box, TileLayout
from pocketllava.types import ImageSource
from pocketllava.vision import sources
from pocketllava.vision.decoding import MAX_PIXELS, pillow_errors
from pocketllava.vision.image import Picture, Pixels, check_pixels, decode, resize_and_crop, size_of
from pocketllava.vision.selection import METHOD, n_selected
from pocketllava.vision.tiles import cut

REMEMBERED = 16  # pictures, 0.3 MB each at 336 x 336 pixels: few conversations show more
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """What the vision tower is shown of a picture, and what tells it from other pictures.

    tiles: (crop_size, crop_size, 3) uint8 each; a single one where pictures are not tiled. tile_keys: of each, key: of
    the picture as it is shown. n_tokens: the positions it takes; fewer than all_tokens if image_tokens were asked for.
    layout: where the tiles lie, None where there is one.
    """

    tiles: tuple[Pixels, ...]
    tile_keys: tuple[str, ...]
    key: str
    n_tokens: int
    all_tokens: int
    layout: TileLayout | None = None

    def boxes(self, grid: int) -> list[Box]:
        """What is picture on each tile, in patches; grid: patches along a tile's side."""
        return self.layout.boxes if self.layout else [(0, grid, 0, grid)]

    def with_tokens(self, image_tokens: int | None) -> PreparedImage:
        """The same picture, shown by at most image_tokens: to every cache another picture."""
        n = n_selected(self.all_tokens, self.layout, image_tokens)
        return self if n == self.all_tokens else replace(self, key=f"{self.key} {METHOD}", n_tokens=n)


class ImageProcessor:
    """Prepares images as one checkpoint's own processor does. Threads may share it."""

    def __init__(
        self, preprocessing: Preprocessing, *, grid: int, max_pixels: int = MAX_PIXELS, encoder: str = ""
    ) -> None:
        """grid: patches along a tile's side. encoder: names what will encode the pixels: keys of towers differ."""
        self.preprocessing, self.max_pixels = preprocessing, max_pixels
        self._grid, self._encoder = grid, encoder
        self._digests: _Recent[sources.FileState | str, str] = _Recent(4 * REMEMBERED)
        self._layouts: _Recent[str, TileLayout] = _Recent(4 * REMEMBERED)
        self._images: _Recent[str, PreparedImage] = _Recent(REMEMBERED)

    def n_tokens(self, source: ImageSource, image_tokens: int | None = None) -> int:
        """Positions that an image takes in a prompt, of image_tokens at most.

        Nothing is decoded: of a picture that is to be tiled, the size is read. Raises ImageError where it cannot be.
        """
        if (tiling := self.preprocessing.tiling) is None:
            return n_selected(self._grid**2, None, image_tokens)
        identity, digest = self._known(source)
        layout = self._layouts.get(digest) if digest is not None else None
        if layout is None:
            content, digest = self._read(source, identity)
            size = size_of(content, sources.name_of(source), self.max_pixels)
            layout = tiling.layout(size, self.preprocessing.crop_size, self._grid)
            self._layouts.put(digest, layout)
        return n_selected(layout.n_tokens, layout, image_tokens)

    def process(self, source: ImageSource) -> PreparedImage:
        """Decode, resize and crop, unless that was done for the same content. Raises ImageError."""
        identity, digest = self._known(source)
        if digest is not None and (image := self._images.get(digest)) is not None:
            return image
        content, digest = self._read(source, identity)
        if (image := self._images.get(digest)) is None:
            with pillow_errors(name := sources.name_of(source)):
                image = self._prepared(decode(content, name, self.max_pixels))
            self._images.put(digest, image)
        return image

    def _prepared(self, picture: Picture) -> PreparedImage:
        if (tiling := self.preprocessing.tiling) is None:
            pixels = resize_and_crop(picture, self.preprocessing)
            key = key_of(pixels, self._encoder)
            return PreparedImage((pixels,), (key,), key, self._grid**2, self._grid**2)
        layout = tiling.layout(picture.size, self.preprocessing.crop_size, self._grid)
        tiles = tuple(cut(picture, layout, self.preprocessing.resample))
        keys = tuple(key_of(tile, self._encoder) for tile in tiles)
        # tiles of other sizes can be equal, and what is unpadded depends on the size
        key = hashlib.sha256(repr((layout, keys)).encode()).hexdigest()
        return PreparedImage(tiles, keys, key, layout.n_tokens, layout.n_tokens, layout)

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

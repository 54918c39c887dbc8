"""Pixels of a picture or tile -> its features (n_patches, n_embd) by libmtmd, and the order in which patches matter.

Knows mmproj files and what is read and corrected in the tower's graph; no text model, no prompt.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BundleError, InputError, StateError
from pocketllava.llamacpp.guard import ShouldStop, translated
from pocketllava.llamacpp.mtmd import MtmdContext
from pocketllava.models.gguf_header import F32, Header
from pocketllava.models.machine import Device
from pocketllava.models.mmproj_contract import CLASS_EMBEDDING, PREFIX, MmprojInfo, check_mmproj
from pocketllava.models.tiling import Box
from pocketllava.vision.feature_cache import Features, Order
from pocketllava.vision.last_block import LastBlock
from pocketllava.vision.selection import scope_order

ENCODER_VERSION = 1  # counts changes to what encode() gives for the same pixels and file


class VisionEncoder:
    """A loaded vision tower and projector. Calls from several threads queue."""

    def __init__(
        self,
        header: Header,
        text_model: Any,
        *,
        n_threads: int,
        n_embd: int,
        device: Device | None = None,
        exact: bool = False,
        info: MmprojInfo | None = None,
    ) -> None:
        """Check and load the file, for a llama_model of width n_embd that outlives this object.

        Raises BundleError for a wrong file or one of another width than the model, BackendError if libmtmd
        refuses it. device: None for the CPU; exact: whether its sums are to be as exact there. info: load it
        unchecked, with this shape.
        """
        self.header, self.path = header, header.path
        mmproj = header.path
        self.info: MmprojInfo = info or check_mmproj(header)
        if n_embd != self.info.projected_width:
            raise BundleError(
                f"{mmproj}: projects to width {self.info.projected_width}, the text model has {n_embd};"
                " it belongs to another model"
            )
        self.correction = LastBlock(
            _class_embedding(header, self.info),
            self.info.n_patches,
            block=_last_block(header, self.info),
            n_heads=int(header.keys[PREFIX + "attention.head_count"]),
            width=self.info.vision_width,
        )
        self.newline = _vector(header, self.info.newline) if self.info.newline else None
        plain = exact and device is not None
        # what tells its features from another device's; nothing on the CPU
        self.kind = f" {device.kind}{' plain' if plain else ''}" if device else ""
        self._lock, self._ranking = threading.Lock(), threading.Lock()
        self._context = MtmdContext(
            mmproj,
            text_model,
            n_threads=n_threads,
            device=device.name if device else None,
            # a fifth faster; rounds keys and values to F16, as the weights of all but F32 files are. On devices it
            # sums in F16 (ggml-cuda/fattn-mma-f16.cuh).
            flash_attention=not (_is_f32(header) or plain),
            callback=self.correction,
        )
        self.device = self._context.device

    @property
    def shape(self) -> tuple[int, int]:
        """Of what encode() gives: (n_patches, projected_width)."""
        return self.info.n_patches, self.info.projected_width

    def encode(self, pixels: npt.NDArray[np.uint8], should_stop: ShouldStop | None = None) -> Features:
        """One picture or tile, (image_size, image_size, 3) uint8 -> (n_patches, projected_width) float32.

        Raises InputError for other pixels, StateError after close(), Interrupted once should_stop() is true.
        """
        side = self.info.image_size
        if pixels.shape != (side, side, 3) or pixels.dtype != np.uint8:
            raise InputError(f"pixels: {pixels.dtype} {pixels.shape}, expected uint8 {(side, side, 3)}")
        with self._lock, translated("encoding the image"):
            if self._context.closed:
                raise StateError("vision encoder: used after close(); load the model again")
            self.correction.should_stop = should_stop
            return self._context.encode(pixels, self.shape)

    def encode_ranked(
        self, pixels: npt.NDArray[np.uint8], box: Box, should_stop: ShouldStop | None = None
    ) -> tuple[Features, Order]:
        """encode(), and the patches of `box` in the order in which they say most of it: SCOPE's, raster numbers.

        box: (top, bottom, left, right) of the tile's patches that are picture, not padding.
        """
        with self._ranking:
            self.correction.collecting = True
            try:
                features = self.encode(pixels, should_stop)
            finally:
                self.correction.collecting = False
            attention, hidden = self.correction.attention(), self.correction.hidden()
        top, bottom, left, right = box
        patches = np.arange(self.info.n_patches).reshape(self.info.grid, -1)[top:bottom, left:right].ravel()
        order = patches[scope_order(attention[patches], hidden[patches])]
        return features, order.astype(np.int16)

    def close(self) -> None:
        """Free the tower; calling it again does nothing."""
        with self._lock:
            self._context.close()


def _class_embedding(header: Header, info: MmprojInfo) -> Features:
    """(n_embd,) float32; empty for a tower without a class token (SigLIP), whose rows libmtmd has right."""
    return _vector(header, CLASS_EMBEDDING) if info.class_token else np.empty(0, np.float32)


def _vector(header: Header, name: str) -> Features:
    """A tensor of F32."""
    tensor = header.tensors[name]
    with header.path.open("rb") as file:
        file.seek(header.data_start + tensor.offset)
        return np.frombuffer(file.read(tensor.n_bytes), "<f4")


def _last_block(header: Header, info: MmprojInfo) -> int:
    """The number of the last block that libmtmd runs: that of the last feature layer, else the last but one."""
    layers = header.keys.get(PREFIX + "feature_layer")
    return int(layers[-1]) - 1 if layers else info.n_blocks - 2


def _is_f32(header: Header) -> bool:
    query = header.tensors.get("v.blk.0.attn_q.weight")
    return query is not None and query.type == F32

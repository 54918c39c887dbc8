"""Pixels of a picture or tile -> its features (n_patches, n_embd) by libmtmd, with its class-token order corrected.

libmtmd puts the class token after the patches, while the position table and everything behind it have it
in front (llama.cpp #25814). The scheduler's callback lets us roll the rows once, after they were
concatenated and before the positions are added; a library that has it right is left alone. Knows mmproj
files; no text model, no prompt.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError, BundleError, InputError, StateError
from pocketllava.llamacpp.guard import EvalCallback, ShouldStop, translated
from pocketllava.llamacpp.library import Node
from pocketllava.llamacpp.mtmd import MtmdContext
from pocketllava.models.gguf_header import F32, Header
from pocketllava.models.mmproj_contract import CLASS_EMBEDDING, MmprojInfo, check_mmproj
from pocketllava.vision.feature_cache import Features

ENCODER_VERSION = 1  # counts changes to what encode() gives for the same pixels and file


class ClassTokenCorrection(EvalCallback):
    """Watches a graph's nodes and moves the class token's row to the front, if it stands at the end.

    The rows it looks at are those of the first CONCAT with n_patches + 1 rows. `corrected` and
    `left_alone` count the images for which it did and did not have to act.
    """

    def __init__(self, class_embedding: Features, n_patches: int) -> None:
        """class_embedding: (n_embd,) float32, the file's `v.class_embd`."""
        super().__init__()
        self.class_embedding, self.n_rows = class_embedding, n_patches + 1
        self.corrected = self.left_alone = 0
        self.enabled = True  # measurements of libmtmd as it is switch it off
        self._waiting = False

    def begin(self) -> None:
        """Before each image; a tower without a class token (SigLIP) has nothing to wait for."""
        self._waiting = self.enabled and self.class_embedding.size > 0

    def wants(self, node: Node) -> bool:
        """The first concatenation of the patches and the class token."""
        return self._waiting and node.operation == b"CONCAT" and node.n_rows == self.n_rows

    def see(self, node: Node) -> None:
        """Roll its rows. Raises BackendError where no class token stands at either end."""
        self._waiting = False
        rows = node.rows(self.class_embedding.size)
        if np.array_equal(rows[-1], self.class_embedding):
            node.write(np.roll(rows, 1, axis=0))
            self.corrected += 1
        elif np.array_equal(rows[0], self.class_embedding):
            self.left_alone += 1
        else:
            raise BackendError(
                "libmtmd: no class token at either end of the patch embeddings; upgrade pocketllava"
            )


class VisionEncoder:
    """A loaded vision tower and projector. Calls from several threads queue."""

    def __init__(
        self,
        header: Header,
        text_model: Any,
        *,
        n_threads: int,
        n_embd: int,
        use_gpu: bool = True,
        info: MmprojInfo | None = None,
    ) -> None:
        """Check and load the file, for a llama_model of width n_embd that outlives this object.

        Raises BundleError for a wrong file or one of another width than the model, BackendError if libmtmd
        refuses it. info: load it unchecked, with this shape.
        """
        self.path = mmproj = header.path
        self.info: MmprojInfo = info or check_mmproj(header)
        if n_embd != self.info.projected_width:
            raise BundleError(
                f"{mmproj}: projects to width {self.info.projected_width}, the text model has {n_embd};"
                " it belongs to another model"
            )
        self.correction = ClassTokenCorrection(_class_embedding(header, self.info), self.info.n_patches)
        self.newline = _vector(header, self.info.newline) if self.info.newline else None
        self._lock = threading.Lock()
        self._context = MtmdContext(
            mmproj,
            text_model,
            n_threads=n_threads,
            use_gpu=use_gpu,
            # a fifth faster; rounds keys and values to F16, as the weights of all but F32 files are
            flash_attention=not _is_f32(header),
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


def _is_f32(header: Header) -> bool:
    query = header.tensors.get("v.blk.0.attn_q.weight")
    return query is not None and query.type == F32

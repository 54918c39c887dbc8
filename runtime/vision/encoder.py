"""Pixels -> image features (n_patches, n_embd) by libmtmd, with its class-token order corrected.

libmtmd puts the class token after the patches, while the position table and everything behind it have it
in front (llama.cpp #25814). The scheduler's callback lets us roll the rows once, after they were
concatenated and before the positions are added; a library that has it right is left alone. Knows mmproj
files and libmtmd; no text model, no prompt.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError, BundleError, InputError
from pocketllava.llamacpp.backend import ggml, gpus, log_lines, translated
from pocketllava.models.gguf_header import Header
from pocketllava.models.mmproj_contract import CLASS_EMBEDDING, F32, MmprojInfo, check_mmproj
from pocketllava.vision.feature_cache import Features

ENCODER_VERSION = 1  # counts changes to what encode() gives for the same pixels and file


class ClassTokenCorrection:
    """Watches a graph's nodes and moves the class token's row to the front, if it finds it at the end.

    The rows it looks at are those of the first CONCAT with n_patches + 1 rows. `corrected` and
    `left_alone` count the images for which it did and did not have to act.
    """

    def __init__(self, class_embedding: Features, n_patches: int) -> None:
        from llama_cpp import llama_cpp

        self.class_embedding, self.n_rows = class_embedding, n_patches + 1
        self.corrected = self.left_alone = 0
        self.error: Exception | None = None
        self._waiting = False
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)  # kept alive with self

    def start(self) -> None:
        """Before each image."""
        self._waiting, self.error = True, None

    def _on_node(self, node: int, ask: bool, _user_data: Any) -> bool:
        try:
            if ask:
                return self._waiting and self._is_concatenation(node)
            self._waiting = False
            self._correct(node)
        except Exception as error:  # must not escape into C; raised after the call
            self.error = error
        return True

    def _is_concatenation(self, node: int) -> bool:
        lib = ggml()
        return bool(lib.ggml_op_desc(node) == b"CONCAT" and lib.ggml_nrows(node) == self.n_rows)

    def _correct(self, node: int) -> None:
        rows = np.empty((self.n_rows, self.class_embedding.size), np.float32)
        if ggml().ggml_nbytes(node) != rows.nbytes:
            raise BackendError(
                f"libmtmd: embeddings of {ggml().ggml_nbytes(node)} bytes, expected {rows.nbytes}"
            )
        ggml().ggml_backend_tensor_get(node, rows.ctypes.data, 0, rows.nbytes)
        if np.array_equal(rows[-1], self.class_embedding):
            rows = np.roll(rows, 1, axis=0)
            ggml().ggml_backend_tensor_set(node, rows.ctypes.data, 0, rows.nbytes)
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
        mmproj: Path,
        text_model: Any,
        *,
        n_threads: int,
        use_gpu: bool = True,
        info: MmprojInfo | None = None,
    ) -> None:
        """Check and load the file, for a llama_model that outlives this object.

        The model is needed although no text is evaluated: without one libmtmd leaves its position type
        uninitialized and miscounts image tokens. Raises BundleError for a wrong file or one of another
        width than the model, BackendError if libmtmd refuses it. info: load it unchecked, with this shape.
        """
        from llama_cpp import llama_cpp, mtmd_cpp

        self.path, self._lib = mmproj, mtmd_cpp
        header = Header.read(mmproj)
        self.info: MmprojInfo = info or check_mmproj(header)
        if (width := llama_cpp.llama_model_n_embd(text_model)) != self.info.projected_width:
            raise BundleError(
                f"{mmproj}: projects to width {self.info.projected_width}, the text model has {width};"
                " it belongs to another model"
            )
        self.correction = _correction(header, self.info)
        self._lock = threading.Lock()
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = use_gpu and bool(gpus())
        params.print_timings = params.warmup = False
        params.n_threads = n_threads
        params.flash_attn_type = (  # a fifth faster; rounds keys and values to F16, as such files' weights are
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            if _is_f32(header)
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        )
        if self.info.class_token:
            params.cb_eval = self.correction.callback
        with translated(f"{mmproj}: loading the vision tower"), log_lines() as lines:
            self._context = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), text_model, params)
            if not self._context:
                raise BackendError(f"{mmproj}: libmtmd could not load it")
        self.device = next((w for w in map(_device_of, lines) if w), "CPU")

    def encode(self, pixels: npt.NDArray[np.uint8]) -> Features:
        """(image_size, image_size, 3) uint8 -> (n_patches, projected_width) float32."""
        side = self.info.image_size
        if pixels.shape != (side, side, 3) or pixels.dtype != np.uint8:
            raise InputError(f"pixels: {pixels.dtype} {pixels.shape}, expected uint8 {(side, side, 3)}")
        with self._lock, translated("encoding the image"):
            if not self._context:
                raise InputError("vision encoder: used after close()")
            return self._encode(np.ascontiguousarray(pixels))

    def _encode(self, pixels: npt.NDArray[np.uint8]) -> Features:
        lib, side = self._lib, self.info.image_size
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap, chunks = lib.mtmd_bitmap_init(side, side, data), lib.mtmd_input_chunks_init()
        try:
            chunk = self._image_chunk(bitmap, chunks)
            self.correction.start()
            failed = lib.mtmd_encode_chunk(self._context, chunk)
            if self.correction.error:
                raise self.correction.error
            if failed:
                raise BackendError(f"libmtmd: encoding failed with code {failed}")
            shape = (self.info.n_patches, self.info.projected_width)
            return np.ctypeslib.as_array(lib.mtmd_get_output_embd(self._context), shape).copy()
        finally:
            lib.mtmd_input_chunks_free(chunks)
            lib.mtmd_bitmap_free(bitmap)

    def _image_chunk(self, bitmap: Any, chunks: Any) -> Any:
        """A prompt that is one image and no text."""
        lib = self._lib
        part = lib.mtmd_input_part(text=None, bitmap=bitmap)
        parts = (ctypes.POINTER(lib.mtmd_input_part) * 1)(ctypes.pointer(part))
        failed = lib.mtmd_tokenize_from_parts(self._context, chunks, parts, 1, False)
        if failed or lib.mtmd_input_chunks_size(chunks) != 1:
            raise BackendError(f"libmtmd: preparing the image failed with code {failed}")
        chunk = lib.mtmd_input_chunks_get(chunks, 0)
        n = lib.mtmd_input_chunk_get_n_tokens(chunk)
        if n != self.info.n_patches:
            raise BackendError(f"libmtmd: {n} image tokens, expected {self.info.n_patches}")
        return chunk

    def close(self) -> None:
        """Free the tower; calling it again does nothing."""
        with self._lock:
            if self._context:
                self._lib.mtmd_free(self._context)
                self._context = None


def _correction(header: Header, info: MmprojInfo) -> ClassTokenCorrection:
    """For a tower without a class token (SigLIP) one that is never asked: libmtmd has its rows right."""
    embedding = _class_embedding(header) if info.class_token else np.empty(0, np.float32)
    return ClassTokenCorrection(embedding, info.n_patches)


def _class_embedding(header: Header) -> Features:
    info = header.tensors[CLASS_EMBEDDING]
    with header.path.open("rb") as file:
        file.seek(header.data_start + info.offset)
        return np.frombuffer(file.read(info.n_bytes), "<f4")


def _is_f32(header: Header) -> bool:
    query = header.tensors.get("v.blk.0.attn_q.weight")
    return query is not None and query.type == F32


def _device_of(line: str) -> str | None:
    """ "clip_ctx: CLIP using CUDA0 backend" -> "CUDA0"."""
    _, using, after = line.partition("CLIP using ")
    return after.removesuffix(" backend").strip() if using else None

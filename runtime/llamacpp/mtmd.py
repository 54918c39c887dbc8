"""A vision tower and projector, loaded by libmtmd: pixels in, feature rows out.

Knows mtmd's structures; nothing of what is wrong with its features (vision/encoder.py).
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError
from pocketllava.llamacpp.devices import address_of, gpus
from pocketllava.llamacpp.guard import EvalCallback, deferred_interrupts, translated
from pocketllava.llamacpp.load_log import vision_device
from pocketllava.llamacpp.log import log_lines


class MtmdContext:
    """An mmproj file in memory. Not thread-safe; freed by close() or with the object."""

    def __init__(
        self,
        mmproj: Path,
        model: Any,
        *,
        n_threads: int,
        device: str | None,
        flash_attention: bool,
        callback: EvalCallback,
    ) -> None:
        """model: a llama_model that outlives this object; without one libmtmd leaves its position type
        uninitialized and miscounts image tokens. device: its name, None for the CPU. Raises BackendError if libmtmd
        refuses the file.
        """
        from llama_cpp import llama_cpp, mtmd_cpp

        self._lib, self._callback = mtmd_cpp, callback
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = device is not None
        if device is not None:
            params.device = address_of(device)
        params.print_timings = params.warmup = False
        params.n_threads = n_threads
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
            if flash_attention
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.cb_eval = callback.function
        with (
            translated(f"{mmproj}: loading the vision tower"),
            log_lines() as lines,
            deferred_interrupts(),
        ):
            self._context = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), model, params)
            if not self._context:
                raise BackendError(f"{mmproj}: libmtmd could not load it")
        self._free = weakref.finalize(self, mtmd_cpp.mtmd_free, self._context)
        self.device = vision_device(lines, gpus())

    def encode(self, pixels: npt.NDArray[np.uint8], shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        """(side, side, 3) uint8 -> features (n_tokens, n_embd) float32 of the expected shape. Raises BackendError."""
        with deferred_interrupts():  # libmtmd also logs, and a log callback can lose a Ctrl-C
            return self._encode(np.ascontiguousarray(pixels), shape)

    def _encode(self, pixels: npt.NDArray[np.uint8], shape: tuple[int, int]) -> npt.NDArray[np.float32]:
        lib, (height, width) = self._lib, pixels.shape[:2]
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap, chunks = lib.mtmd_bitmap_init(width, height, data), lib.mtmd_input_chunks_init()
        try:
            chunk = self._image_chunk(bitmap, chunks, shape[0])
            self._callback.begin()
            code = lib.mtmd_encode_chunk(self._context, chunk)
            self._callback.check()
            if code:
                raise BackendError(f"libmtmd: encoding failed with code {code}")
            return np.ctypeslib.as_array(lib.mtmd_get_output_embd(self._context), shape).copy()
        finally:
            lib.mtmd_input_chunks_free(chunks)
            lib.mtmd_bitmap_free(bitmap)

    def _image_chunk(self, bitmap: Any, chunks: Any, n_tokens: int) -> Any:
        """A prompt that is one image and no text."""
        lib = self._lib
        part = lib.mtmd_input_part(text=None, bitmap=bitmap)
        parts = (ctypes.POINTER(lib.mtmd_input_part) * 1)(ctypes.pointer(part))
        code = lib.mtmd_tokenize_from_parts(self._context, chunks, parts, 1, False)
        if code or lib.mtmd_input_chunks_size(chunks) != 1:
            raise BackendError(f"libmtmd: preparing the image failed with code {code}")
        chunk = lib.mtmd_input_chunks_get(chunks, 0)
        n = lib.mtmd_input_chunk_get_n_tokens(chunk)
        if n != n_tokens:
            raise BackendError(f"libmtmd: {n} image tokens, expected {n_tokens}")
        return chunk

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return not self._free.alive

    def close(self) -> None:
        """Free it; calling it again does nothing."""
        self._free()

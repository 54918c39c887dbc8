"""Bundle -> a loaded llama_cpp.Llama with its handler, on the best device that this build offers.

Knows llama_cpp.Llama's settings and why each has its value; nothing of prompts or answers.
"""

from __future__ import annotations

import contextlib
import logging
import re
from typing import Any

from pocketllava.backend import cores, gpus, keep_file_descriptors, log_lines, translated
from pocketllava.errors import BackendError, UnsupportedOption
from pocketllava.image import MAX_PIXELS
from pocketllava.llava import context_size
from pocketllava.models import Bundle
from pocketllava.models.header import Header

logger = logging.getLogger(__name__)

MIN_BATCH = 512  # llama.cpp's default; an image's patches go in one batch if there are more


def load_bundle(
    bundle: Bundle, n_ctx: int | None, n_threads: int | None, n_gpu_layers: int, max_pixels: int | None
) -> tuple[Any, Any, str]:
    """(Llama, LlavaChatHandler, what evaluates the text model). Raises UnsupportedOption, BackendError."""
    from pocketllava.handler import LlavaChatHandler

    threads = n_threads if n_threads is not None else cores()
    if threads < 1:
        raise UnsupportedOption(f"n_threads: found {threads}, expected at least 1")
    found = gpus()
    if n_gpu_layers > 0 and not found:
        raise UnsupportedOption(
            f"n_gpu_layers: found {n_gpu_layers}, but this llama-cpp-python was built for CPUs only;"
            " install a Metal or CUDA build (README.md) or leave it out"
        )
    trained = int(Header.read(bundle.model).keys.get("llama.context_length", 2048))
    batch = max(MIN_BATCH, int(bundle.manifest["image"]["n_patches"]))
    settings = {
        "n_ctx": context_size(n_ctx, trained),
        "n_batch": batch,
        "n_ubatch": batch,
        "n_threads": threads,
        "n_threads_batch": threads,
        "verbose": False,
    }
    layers = n_gpu_layers if found else 0
    handler = LlavaChatHandler(bundle.folder, use_gpu=layers != 0, max_pixels=max_pixels or MAX_PIXELS)
    try:
        llama, lines = _load(bundle, handler, layers, settings)
    except BackendError:
        if layers != -1:
            raise
        logger.warning("%s does not fit on %s: using the CPU for the text model", bundle.model, found[0])
        llama, lines = _load(bundle, handler, 0, settings)
    try:
        handler.vision(llama)  # a foreign or damaged mmproj is refused now, not with the first image
    except BaseException:
        with contextlib.suppress(Exception):
            llama.close()
        raise
    return llama, handler, _device(lines, found, threads)


def _load(bundle: Bundle, handler: Any, layers: int, settings: dict[str, Any]) -> tuple[Any, list[str]]:
    """(Llama, what was logged meanwhile). Raises BackendError."""
    from llama_cpp import Llama

    with translated(f"{bundle.model}: loading the text model"), log_lines() as lines, keep_file_descriptors():
        llama = Llama(str(bundle.model), n_gpu_layers=layers, chat_handler=handler, **settings)
    return llama, lines


def _device(lines: list[str], found: list[str], threads: int) -> str:
    """ "CUDA0 (NVIDIA RTX 4070), 33/33 layers" or "CPU, 8 threads", from what llama.cpp logged."""
    for line in lines:
        if (match := re.search(r"offloaded (\d+)/(\d+) layers", line)) and found and int(match[1]):
            return f"{found[0]}, {match[1]}/{match[2]} layers"
    return f"CPU, {threads} thread{'s' if threads != 1 else ''}"

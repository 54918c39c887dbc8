"""Bundle -> a loaded llama_cpp.Llama with its handler, on the best device that this build offers.

Knows llama_cpp.Llama's settings and why each has its value; nothing of prompts or answers.
"""

from __future__ import annotations

import contextlib
import logging
import re
from typing import Any

from pocketllava.errors import BackendError, UnsupportedOption
from pocketllava.llamacpp.backend import cores, gpus, keep_file_descriptors, log_lines, translated
from pocketllava.models import Bundle
from pocketllava.models.gguf_header import Header
from pocketllava.models.memory import (
    DEFAULT_CONTEXT,
    available_bytes,
    batch_size,
    better_in_memory,
    context_size,
    memory,
)
from pocketllava.types import GIGA, LoadOptions
from pocketllava.vision.image import MAX_PIXELS

logger = logging.getLogger(__name__)

Q8_0 = 8  # enum ggml_type
# Flash attention shortens the wait for an answer and, on CPUs, lengthens the answer itself (benchmarks/README.md);
# on GPUs it helps both. Its F16 sums flipped 4 of 60 greedy tokens of an F16 bundle.
# Beside a quantized type's own error they are nothing; bundles that promise the reference's tokens go without.
EXACT = ("F32", "F16", "BF16")


def load_bundle(bundle: Bundle, how: LoadOptions) -> tuple[Any, Any, str]:
    """(Llama, LlavaChatHandler, what evaluates the text model). Raises UnsupportedOption, BackendError."""
    from pocketllava.integrations.llama_cpp import LlavaChatHandler

    found = gpus()
    if how.n_gpu_layers > 0 and not found:
        raise UnsupportedOption(
            f"n_gpu_layers: found {how.n_gpu_layers}, but this llama-cpp-python was built for CPUs only;"
            " install a Metal or CUDA build (README.md) or leave it out"
        )
    layers = how.n_gpu_layers if found else 0
    handler = LlavaChatHandler(
        bundle.folder,
        use_gpu=layers != 0,
        max_pixels=how.max_pixels or MAX_PIXELS,
        cache_dir=how.cache_dir,
        cache_bytes=how.cache_bytes,
        keep_prefixes=how.keep_prefixes,
    )
    try:
        llama, device = _load(bundle, handler, layers, how)
    except BackendError:
        if layers != -1:
            raise
        logger.warning("%s does not fit on %s: using the CPU for the text model", bundle.model, found[0])
        llama, device = _load(bundle, handler, 0, how)
    try:
        handler.vision(llama)  # a foreign or damaged mmproj is refused now, not with the first image
    except BaseException:
        with contextlib.suppress(Exception):
            llama.close()
        raise
    return llama, handler, device


def _load(bundle: Bundle, handler: Any, layers: int, how: LoadOptions) -> tuple[Any, str]:
    """(Llama, where it is). Raises UnsupportedOption, BackendError."""
    from llama_cpp import Llama

    threads = how.n_threads if how.n_threads is not None else cores()
    trained = int(Header.read(bundle.model).keys.get("llama.context_length", DEFAULT_CONTEXT))
    in_memory = _in_memory(bundle, layers != 0, how)
    settings: dict[str, Any] = {
        "n_ctx": context_size(how.n_ctx, trained),
        "n_batch": batch_size(bundle),
        "n_ubatch": batch_size(bundle),
        "n_threads": threads,
        "n_threads_batch": threads,
        "use_mmap": not in_memory,
        "flash_attn": bundle.manifest["types"]["model"] not in EXACT,
        "verbose": False,
    }
    if how.kv_type == "q8_0":  # llama.cpp quantizes values only with flash attention
        settings |= {"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True}
    with translated(f"{bundle.model}: loading the text model"), log_lines() as lines, keep_file_descriptors():
        llama = Llama(str(bundle.model), n_gpu_layers=layers, chat_handler=handler, **settings)
    where = _device(lines, gpus(), threads)
    return llama, f"{where}, weights {'in memory' if in_memory else 'mapped'}"


def _in_memory(bundle: Bundle, on_gpu: bool, how: LoadOptions) -> bool:
    needed = memory(bundle, how.n_ctx, how.kv_type)
    if not on_gpu and (free := available_bytes()) < needed.total:
        logger.warning(
            "%s: needs about %.1f GB of memory, %.1f GB are free; a smaller n_ctx (--ctx) or kv_type q8_0 (--kv-type)"
            " takes less", bundle.folder, needed.total / GIGA, free / GIGA,
        )  # fmt: skip
    return how.weights == "memory" or (how.weights == "auto" and better_in_memory(bundle, needed, on_gpu))


def _device(lines: list[str], found: list[str], threads: int) -> str:
    """ "CUDA0 (NVIDIA RTX 4070), 33/33 layers" or "CPU, 8 threads", from what llama.cpp logged."""
    for line in lines:
        if (match := re.search(r"offloaded (\d+)/(\d+) layers", line)) and found and int(match[1]):
            return f"{found[0]}, {match[1]}/{match[2]} layers"
    return f"CPU, {threads} thread{'s' if threads != 1 else ''}"

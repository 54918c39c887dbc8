"""Bundle -> a loaded Session, on the best device that this build of llama.cpp offers.

Knows llama_cpp.Llama's settings and why each has its value; nothing of prompts or answers.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pocketllava.engine.session import Session
from pocketllava.errors import BackendError, UnsupportedOption
from pocketllava.llamacpp.devices import cores, gpus
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.models import Bundle
from pocketllava.models.memory import (
    Memory,
    available_bytes,
    batch_size,
    better_in_memory,
    check_memory,
    context_size,
    memory,
    rearranged,
)
from pocketllava.types import GIGA, LoadOptions

logger = logging.getLogger(__name__)
T = TypeVar("T")

Q8_0 = 8  # enum ggml_type
# Flash attention shortens the wait for an answer and, on CPUs, lengthens the answer itself (benchmarks/README.md);
# on GPUs it helps both. Its F16 sums flipped 4 of 60 greedy tokens of an F16 bundle.
# Beside a quantized type's own error they are nothing; bundles that promise the reference's tokens go without.
EXACT = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Loaded:
    """A session, and what evaluates its text model, such as "CPU, 2 threads, weights in memory"."""

    session: Session
    device: str


def load_bundle(bundle: Bundle, options: LoadOptions) -> Loaded:
    """Raises UnsupportedOption for what this build cannot do, BundleError, BackendError."""
    _ = bundle.text_info, bundle.mmproj_info  # both are checked before anything is loaded
    devices = gpus()
    if options.n_gpu_layers > 0 and not devices:
        raise UnsupportedOption(
            f"n_gpu_layers: found {options.n_gpu_layers}, but this llama-cpp-python was built for CPUs only;"
            " install a Metal or CUDA build (docs/devices.md) or leave it out"
        )
    layers = options.n_gpu_layers if devices else 0
    text, device = or_on_cpu(lambda n: _load_text(bundle, n, options), layers, bundle, devices)
    try:
        return Loaded(Session(text, bundle.mmproj, bundle, options, use_gpu=layers != 0), device)
    except BaseException:
        with contextlib.suppress(Exception):
            text.close()
        raise


def or_on_cpu(load: Callable[[int], T], layers: int, bundle: Bundle, devices: list[str]) -> T:
    """What load(layers) gives; load(0) where all layers were to be on the GPU (-1) and that failed."""
    try:
        return load(layers)
    except BackendError as error:
        if layers != -1:
            raise
        logger.warning(
            "%s does not load on %s: using the CPU for the text model (%s)", bundle.model, devices[0], error
        )
    return load(0)


def _load_text(bundle: Bundle, layers: int, options: LoadOptions) -> tuple[TextModel, str]:
    """The text model, and where it is. Raises UnsupportedOption, BundleError, BackendError."""
    threads = options.n_threads if options.n_threads is not None else cores()
    info = bundle.text_info
    n_ctx = context_size(options.n_ctx, info.n_ctx_train, bundle.image_tokens)
    if options.n_ctx is not None and n_ctx != options.n_ctx:
        logger.warning("n_ctx: %d became %d, the next length that llama.cpp allocates", options.n_ctx, n_ctx)
    on_gpu, needed = layers != 0, memory(bundle, options.n_ctx, options.kv_type)
    in_memory = _in_memory(bundle, needed, on_gpu, threads, options)
    settings: dict[str, Any] = {
        "n_ctx": n_ctx,
        "n_batch": batch_size(bundle),
        "n_ubatch": batch_size(bundle),
        "n_threads": threads,
        "n_threads_batch": threads,
        "use_mmap": not in_memory,
        "flash_attn": _flash_attention(bundle, options),
    }
    if options.kv_type == "q8_0":
        settings |= {"type_k": Q8_0, "type_v": Q8_0}
    # config.json may name several ends; a GGUF file holds one
    text, lines = TextModel.load(
        bundle.model,
        bundle.manifest.eos_token_ids,
        info=info,
        header=bundle.model_header,
        releases_pages=not in_memory and rearranged(bundle, needed, on_gpu),
        n_gpu_layers=layers,
        **settings,
    )
    return text, f"{device_of(lines, gpus(), threads)}, weights {'in memory' if in_memory else 'mapped'}"


def _flash_attention(bundle: Bundle, options: LoadOptions) -> bool:
    """llama.cpp quantizes the KV cache's values with flash attention only."""
    if options.flash_attn != "auto" or options.kv_type == "q8_0":
        return options.flash_attn != "off"
    return bundle.manifest.types.model not in EXACT


def _in_memory(bundle: Bundle, needed: Memory, on_gpu: bool, threads: int, options: LoadOptions) -> bool:
    """Whether the weights will be read; raises BackendError where there is no room for them."""
    if not on_gpu and (free := available_bytes()) < needed.total:
        logger.warning(
            "%s: needs about %.1f GB of memory, %.1f GB are free; a smaller n_ctx (--ctx) or kv_type q8_0 (--kv-type)"
            " takes less", bundle.folder, needed.total / GIGA, free / GIGA,
        )  # fmt: skip
    in_memory = options.weights == "memory" or (
        options.weights == "auto" and better_in_memory(bundle, needed, on_gpu)
    )
    check_memory(bundle, needed, in_memory=in_memory, on_gpu=on_gpu, threads=threads)
    return in_memory


def device_of(lines: list[str], devices: list[str], threads: int) -> str:
    """ "CUDA0 (NVIDIA RTX 4070), 33/33 layers" or "CPU, 8 threads", from what llama.cpp logged."""
    for line in lines:
        if (match := re.search(r"offloaded (\d+)/(\d+) layers", line)) and devices and int(match[1]):
            return f"{devices[0]}, {match[1]}/{match[2]} layers"
    return f"CPU, {threads} thread{'s' if threads != 1 else ''}"

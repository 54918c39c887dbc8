"""The memory planner: what loading a bundle takes with a given context, and whether to map or read its weights.

Knows GGUF headers, what llama.cpp allocates, and how much memory is free; loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from pocketllava.errors import UnsupportedOption
from pocketllava.models.bundle import Bundle
from pocketllava.models.gguf_header import Header
from pocketllava.models.limits import UNLIMITED, cgroup_limits, check_room
from pocketllava.models.text_contract import TextInfo

DEFAULT_CONTEXT = 2048  # less if trained on less
DEFAULT_ROOM = 1472  # beside one picture: a conversation, and an answer of 512 tokens
CONTEXT_STEP = 256  # llama.cpp pads the context to it; llama_cpp's buffers must agree
MIN_BATCH = 512  # llama.cpp's default
TEXT_ROOM = 64  # positions of a batch beside those of an image or a tile: a question goes with it
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}  # a value; ggml's block_q8_0 is 32 values in 34 bytes
F32_BYTES = 4
# enum ggml_type: Q4_0, Q8_0, Q2_K, Q4_K, Q5_K, Q6_K, IQ4_NL, which ggml-cpu/repack.cpp rearranges on some CPUs
REPACKED = (2, 8, 10, 12, 13, 14, 20)


@dataclass(frozen=True)
class Memory:
    """Bytes that a loaded bundle takes; `prefix` for each evaluated image that the prefix cache keeps."""

    n_ctx: int
    kv_type: str
    text: int
    vision: int
    kv_cache: int
    buffers: int
    prefix: int

    @property
    def total(self) -> int:
        """All but cached prefixes."""
        return self.text + self.vision + self.kv_cache + self.buffers

    @property
    def beside_text(self) -> int:
        """All but cached prefixes and the text model's weights, which may be mapped."""
        return self.total - self.text


def context_size(n_ctx: int | None, trained: int, image_tokens: int) -> int:
    """n_ctx rounded up as llama.cpp needs it; by default enough for a picture of image_tokens and a conversation.

    Raises UnsupportedOption outside what the model was trained on.
    """
    if n_ctx is None:
        n_ctx = min(max(DEFAULT_CONTEXT, image_tokens + DEFAULT_ROOM), trained)
    if not 1 <= n_ctx <= trained:
        raise UnsupportedOption(
            f"n_ctx: found {n_ctx}, expected 1 to {trained}, the context of the model's training"
        )
    return -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP


def batch_size(bundle: Bundle) -> int:
    """Positions that are evaluated at once: at least those of an image or a tile, and a question."""
    return max(MIN_BATCH, bundle.manifest.n_patches + TEXT_ROOM)


def memory(bundle: Bundle, n_ctx: int | None = None, kv_type: str = "f16") -> Memory:
    """The memory that loading would take. Raises UnsupportedOption for a context the model was not trained on."""
    info = bundle.text_info
    context = context_size(n_ctx, info.n_ctx_train, bundle.image_tokens)
    batch = min(batch_size(bundle), context)
    position = _kv_bytes_per_position(info, kv_type)
    return Memory(
        n_ctx=context,
        kv_type=kv_type,
        text=_tensor_bytes(bundle.model_header),
        vision=_tensor_bytes(bundle.mmproj_header),
        kv_cache=round(position * context),
        buffers=_buffer_bytes(info, context, batch, flash=kv_type != "f16"),
        prefix=round(position * bundle.image_tokens),
    )


def available_bytes() -> int:
    """Memory that this process can have without swapping."""
    return min(int(psutil.virtual_memory().available), *(left for _, left in cgroup_limits()), UNLIMITED)


def better_in_memory(bundle: Bundle, needed: Memory, on_gpu: bool) -> bool:
    """Whether to read the text model's weights rather than map their file.

    Many CPUs compute with a rearranged copy of quantized weights, beside which the mapped file stays
    resident: 7.9 GB instead of 5.0 for a 7B model in Q4_K_M. The map is better where memory is short, because
    its pages can be dropped, and where weights are used in the file's own layout (F16, GPUs).
    """
    return rearranged(bundle, needed, on_gpu) and needed.total <= available_bytes()


def rearranged(bundle: Bundle, needed: Memory, on_gpu: bool) -> bool:
    """Whether CPUs may compute with a copy of most of the text model's weights, in another order."""
    return not on_gpu and 2 * _repacked(bundle) > needed.text


def check_memory(bundle: Bundle, needed: Memory, *, in_memory: bool, on_gpu: bool, threads: int) -> None:
    """Raises BackendError where the process may not have what loading takes, on which llama.cpp would end it.

    Mapped weights are address space, but no memory that a cgroup has to find: their pages can be dropped. What a
    GPU holds is not counted.
    """
    if on_gpu:
        check_room(bundle.folder, 0, needed.text, threads=threads)
    elif in_memory:
        check_room(bundle.folder, needed.total, threads=threads)
    else:
        check_room(bundle.folder, needed.beside_text, needed.text, threads=threads)


def _repacked(bundle: Bundle) -> int:
    """Bytes of weights of which CPUs make a rearranged copy."""
    return sum(t.n_bytes for t in bundle.model_header.tensors.values() if t.type in REPACKED)


def _kv_bytes_per_position(info: TextInfo, kv_type: str) -> float:
    return 2 * info.n_layer * info.head_size * info.n_head_kv * KV_BYTES[kv_type]


def _buffer_bytes(info: TextInfo, context: int, batch: int, *, flash: bool) -> int:
    """Estimated bytes of one batch's intermediate results: attention scores, widest activations, logits."""
    scores = 0 if flash else info.n_head * context
    activations = 2 * info.n_ff + 4 * info.n_embd
    return int(batch * F32_BYTES * (max(scores, info.n_vocab) + activations))


def _tensor_bytes(header: Header) -> int:
    return sum(t.n_bytes for t in header.tensors.values())

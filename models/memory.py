"""What loading a bundle takes, part by part, computed from its headers.

Knows GGUF headers and what llama.cpp allocates for them; neither this machine (models/machine.py) nor what fits it
(models/plan.py), and loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketllava.errors import UnsupportedOption
from pocketllava.models.bundle import Bundle
from pocketllava.models.gguf_header import F16, F32, Header, TensorInfo
from pocketllava.models.mmproj_contract import PREFIX, MmprojInfo
from pocketllava.models.text_contract import TextInfo

DEFAULT_CONTEXT = 2048  # less if trained on less
DEFAULT_ROOM = 1472  # beside one picture: a conversation, and an answer of 512 tokens
LEAST_ROOM = 448  # beside one picture: a question and a short answer
CONTEXT_STEP = 256  # llama.cpp pads the context to it; llama_cpp's buffers must agree
MIN_BATCH = 512  # llama.cpp's default
TEXT_ROOM = 64  # positions of a batch beside those of an image or a tile: a question goes with it
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}  # a value; ggml's block_q8_0 is 32 values in 34 bytes
F32_BYTES = 4
# Measured (benchmarks/planned_memory.py): Python, numpy, Pillow, Jinja and llama.cpp's libraries; a token's piece and
# id in libllama, llama_cpp and the header that was read; copies of a picture's features between libmtmd and libllama.
PROCESS_BYTES, TOKEN_BYTES, FEATURE_COPIES = 76 << 20, 400, 4
UPLOAD_BYTES = 1 << 20
MIN_NODES, NODES_A_TENSOR, NODE_BYTES = 1024, 8, 2 * 30 * 336
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class Memory:
    """Bytes that a loaded bundle takes while it answers about its first picture.

    text: the text model's weights; rearranged: those of them that this CPU computes with in another order, a copy
    where the file is mapped; looked_up: those of which single rows are read. vision_buffers and buffers: intermediate
    results of the vision tower and of one batch; picture: its features and pixels; vocabulary: its pieces, in libllama
    and here; process: Python and libraries.
    Not part of the total: full, what buffers take beyond that once the context is full; reserved, what llama.cpp asks
    for beyond `buffers`, touched or not; prefix, of an evaluated picture; work and
    vision_work, what a device's backend takes by itself for products (the text model's, the vision tower's).
    """

    n_ctx: int
    kv_type: str
    text: int
    rearranged: int
    looked_up: int
    vision: int
    vision_buffers: int
    kv_cache: int
    buffers: int
    picture: int
    vocabulary: int
    process: int
    full: int
    reserved: int
    prefix: int
    work: int = 0
    vision_work: int = 0

    @property
    def total(self) -> int:
        """All parts, with the weights held once."""
        return self.text + self.beside_text

    @property
    def beside_text(self) -> int:
        """All but the text model's weights."""
        allocated = self.vision + self.vision_buffers + self.kv_cache + self.buffers
        return allocated + self.picture + self.vocabulary + self.process

    @property
    def mostly_rearranged(self) -> bool:
        """Whether this CPU computes with another order of most of the text model's weights."""
        return 2 * self.rearranged > self.text


@dataclass(frozen=True)
class Shares:
    """Bytes of a text model's weights: of the embedding, of the output layer, and of each block."""

    embedding: int
    output: int
    blocks: tuple[int, ...]

    def last(self, n_layers: int) -> int:
        """Of the last n_layers, as llama.cpp counts them: the output layer first, then the blocks from the end."""
        if n_layers <= 0:
            return 0
        n_blocks = min(n_layers - 1, len(self.blocks))
        return self.output + sum(self.blocks[len(self.blocks) - n_blocks :])


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
    return _rounded(n_ctx)


def smaller_contexts(n_ctx: int, image_tokens: int) -> list[int]:
    """Contexts below n_ctx that hold a picture, a question and a short answer, the largest first."""
    least = _rounded(image_tokens + LEAST_ROOM)
    return list(range(n_ctx - CONTEXT_STEP, least - 1, -CONTEXT_STEP))


def batch_size(bundle: Bundle) -> int:
    """Positions that are evaluated at once: at least those of an image or a tile, and a question."""
    return max(MIN_BATCH, bundle.manifest.n_patches + TEXT_ROOM)


def memory(
    bundle: Bundle,
    n_ctx: int | None = None,
    kv_type: str = "f16",
    *,
    flash: bool | None = None,
    rearranged_types: frozenset[int] = frozenset(),
    image_tokens: int | None = None,
) -> Memory:
    """The memory that loading would take. Raises UnsupportedOption for a context the model was not trained on.

    flash: whether flash attention is used, None: only with a quantized KV cache. rearranged_types: ggml's types that
    the CPU rearranges. image_tokens: the most that a picture takes, None: all.
    """
    info = bundle.text_info
    context = context_size(n_ctx, info.n_ctx_train, bundle.image_tokens)
    position = _kv_bytes_per_position(info, kv_type)
    flash = kv_type != "f16" if flash is None else flash
    tensors, shown = (
        bundle.model_header.tensors,
        min(image_tokens or bundle.image_tokens, bundle.image_tokens),
    )
    held = min(_rounded(shown + TEXT_ROOM), context)
    rows, full = (_text_rows(info, n, kv_type, flash=flash) for n in (held, context))
    asked = max(full, info.n_vocab + (2 if kv_type == "f16" else 3) * info.n_embd)  # logits of a whole batch
    batch = F32_BYTES * min(batch_size(bundle), context)
    return Memory(
        n_ctx=context,
        kv_type=kv_type,
        text=_tensor_bytes(bundle.model_header),
        rearranged=sum(t.n_bytes for t in tensors.values() if _is_rearranged(t, rearranged_types)),
        looked_up=tensors[EMBEDDING].n_bytes if OUTPUT in tensors else 0,
        vision=_tensor_bytes(bundle.mmproj_header),
        vision_buffers=_vision_buffer_bytes(bundle.mmproj_header, bundle.mmproj_info),
        kv_cache=round(position * context),
        buffers=batch * rows,
        picture=FEATURE_COPIES * F32_BYTES * max(shown, bundle.manifest.n_patches) * info.n_embd,
        vocabulary=TOKEN_BYTES * info.n_vocab,
        process=PROCESS_BYTES,
        full=batch * (full - rows),
        reserved=batch * (asked - rows) + _untouched_bytes(bundle),
        prefix=round(position * shown),
        work=_work_bytes(bundle.model_header, batch_size(bundle)),
        vision_work=vision_work_bytes(bundle.mmproj_header, bundle.mmproj_info),
    )


def shares(bundle: Bundle) -> Shares:
    """Where the text model's weights are. A tied output layer is a copy of the embedding."""
    blocks = [0] * bundle.text_info.n_layer
    embedding = output = 0
    for t in bundle.model_header.tensors.values():
        if t.name.startswith("blk."):
            blocks[int(t.name.split(".")[1])] += t.n_bytes
        elif t.name == EMBEDDING:
            embedding = t.n_bytes
        else:
            output += t.n_bytes
    tied = OUTPUT not in bundle.model_header.tensors
    return Shares(embedding, output + tied * embedding, tuple(blocks))


def vision_bytes_in(bundle: Bundle, bytes_a_value: float) -> int:
    """Bytes of the vision tower with its matrices of F16 and more in another type."""
    return sum(
        min(t.n_bytes, round(_n_values(t) * bytes_a_value)) if _is_large(t) else t.n_bytes
        for t in bundle.mmproj_header.tensors.values()
    )


def text_bytes_in(bundle: Bundle, bytes_a_value: float) -> int:
    """Bytes of the text model's weights with matrices of so many bytes a value, on average."""
    return sum(
        min(t.n_bytes, round(_n_values(t) * bytes_a_value)) if len(t.shape) > 1 else t.n_bytes
        for t in bundle.model_header.tensors.values()
    )


def _rounded(n_ctx: int) -> int:
    return -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP


def _is_rearranged(tensor: TensorInfo, types: frozenset[int]) -> bool:
    """As ggml-cpu/repack.cpp decides; rows are looked up in the embedding, which no other order has."""
    return (
        tensor.type in types
        and len(tensor.shape) == 2
        and tensor.name != EMBEDDING
        and _n_rows(tensor) % 8 == 0
    )


def _kv_bytes_per_position(info: TextInfo, kv_type: str) -> float:
    return 2 * info.n_layer * info.head_size * info.n_head_kv * KV_BYTES[kv_type]


def _text_rows(info: TextInfo, positions: int, kv_type: str, *, flash: bool) -> int:
    """Values a position that one batch's intermediate results have at their most: in attention or the feed-forward.

    positions: that the KV cache holds. Fitted to "compute buffer size" in llama.cpp's log (tests/test_plan.py).
    Without flash attention the mask is F32 and every head has scores.
    """
    mask = positions // 2 if flash else positions
    beside = 5 - flash - (kv_type != "f16")  # of n_embd values, beside the feed-forward's
    attention = mask + (5 * info.n_embd if flash else 7 * info.n_embd + info.n_head * positions)
    return max(attention, 3 * info.n_ff + beside * info.n_embd + mask)


def _untouched_bytes(bundle: Bundle) -> int:
    """Addresses that are asked for and never used: llama_cpp's scores, and the scheduler's room for copies of tensors
    between devices (ggml_backend_sched_new) beyond that of a small model, which OVERHEAD_BYTES has.
    """
    nodes = max(MIN_NODES, NODES_A_TENSOR * len(bundle.model_header.tensors)) - MIN_NODES
    return F32_BYTES * batch_size(bundle) * bundle.text_info.n_vocab + nodes * NODE_BYTES


def _work_bytes(header: Header, positions: int) -> int:
    """What a device's backend allocates by itself while it multiplies, and ends the process without.

    A matrix in F16, and both sides of a product in F32 (prealloc_x, prealloc_y and split_k of ggml-vulkan.cpp; the
    pool of ggml-cuda.cu), and what it uploads with.
    """
    matrices = [t for t in header.tensors.values() if len(t.shape) == 2 and t.name not in (EMBEDDING, OUTPUT)]
    widest = max((max(t.shape) for t in matrices), default=0)
    largest = max((_n_values(t) for t in matrices), default=0)
    return 2 * largest + 2 * F32_BYTES * positions * widest + UPLOAD_BYTES


def vision_work_bytes(header: Header, info: MmprojInfo) -> int:
    """The same for the vision tower, with the scores that it has without flash attention."""
    positions = info.n_patches + info.class_token
    scores = F32_BYTES * int(header.keys[PREFIX + "attention.head_count"]) * positions**2
    return _work_bytes(header, positions) + scores


def vision_bytes(header: Header, info: MmprojInfo) -> int:
    """All that a vision tower takes on a device."""
    return _tensor_bytes(header) + _vision_buffer_bytes(header, info) + vision_work_bytes(header, info)


def _vision_buffer_bytes(header: Header, info: MmprojInfo) -> int:
    """Of one picture in the tower: pixels, and the feed-forward, the scores or the projector. Fitted as above."""
    keys = header.keys
    positions = info.n_patches + info.class_token
    pixels = 3 * info.image_size**2 // positions
    rows = [
        int(keys[PREFIX + "feed_forward_length"]) + 4 * info.vision_width,
        2 * info.projected_width + info.vision_width,
        pixels // 2,  # in F16, as columns
    ]
    query = header.tensors.get("v.blk.0.attn_q.weight")
    if query is not None and query.type == F32:  # no flash attention
        rows.append(int(keys[PREFIX + "attention.head_count"]) * positions + info.vision_width)
    return F32_BYTES * positions * (pixels + max(rows))


def _is_large(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 2 and tensor.type in (F32, F16, 30) and tensor.name.endswith(".weight")


def _n_rows(tensor: TensorInfo) -> int:
    return tensor.shape[0]


def _n_values(tensor: TensorInfo) -> int:
    n = 1
    for size in tensor.shape:
        n *= size
    return n


def _tensor_bytes(header: Header) -> int:
    return sum(t.n_bytes for t in header.tensors.values())

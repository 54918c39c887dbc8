"""One picture followed through the model, from a real evaluation whose graph is read on the way.

The text model's first block normalizes its input (RMS norm, before any weight); that node is read at the
image's positions in a context of its own and compared with the image features, normalized the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp

from pocketllava.errors import BackendError, InputError
from pocketllava.integrations.llama_cpp import LlavaChatHandler
from pocketllava.llamacpp.backend import ggml, translated
from pocketllava.llamacpp.batch import decode_features
from pocketllava.models.memory import CONTEXT_STEP
from pocketllava.prompt.template import ImagePlace
from pocketllava.types import Message, Trace
from pocketllava.vision.feature_cache import Features

FIRST_NORM = b"norm-0"  # llm_graph_context::build_norm names the node "norm", block 0
TOLERANCE = 1e-4


class FirstNorm:
    """Collects the first block's normalized input, batch by batch: the first such node of each graph."""

    def __init__(self, n_embd: int) -> None:
        self.n_embd, self.rows = n_embd, np.empty((0, n_embd), np.float32)
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)
        self._waiting = False

    def start(self) -> None:
        """Before each batch. (The block's second norm has the same name.)"""
        self._waiting = True

    def _on_node(self, node: int, ask: bool, _user_data: Any) -> bool:
        if ask:
            return self._waiting and bool(ggml().ggml_get_name(node) == FIRST_NORM)
        self._waiting = False
        rows = np.empty((ggml().ggml_nrows(node), self.n_embd), np.float32)
        if ggml().ggml_nbytes(node) == rows.nbytes:
            ggml().ggml_backend_tensor_get(node, rows.ctypes.data, 0, rows.nbytes)
            self.rows = np.concatenate([self.rows, rows])
        return True


def trace(llama: Any, handler: LlavaChatHandler, messages: Sequence[Message]) -> Trace:
    """Evaluate a conversation with one picture in a context of its own. Raises InputError, BackendError."""
    images = [image for message in messages for image in message.images]
    if len(images) != 1:
        raise InputError(f"trace: found {len(images)} images, expected 1")
    pixels = handler.prepare(llama, images)[0]
    vision = handler.vision(llama)
    corrected = vision.correction.corrected
    features = vision.encode(pixels)
    ids = handler.prompt_ids(llama, messages)
    first = next(n for n, item in enumerate(ids) if isinstance(item, ImagePlace))
    last = first + len(features) - 1
    with translated("tracing the image"):
        seen = _evaluate(llama, ids, features)
    if len(seen) != len(ids) - 1 + len(features):
        raise BackendError(
            f"trace: read {len(seen)} positions of {len(ids) - 1 + len(features)} from the graph"
        )
    eps = float(llama.metadata.get("llama.attention.layer_norm_rms_epsilon", 1e-5))
    difference = float(np.abs(seen[first : last + 1] - _normalized(features, eps)).max())
    template = handler.template(llama)
    image_id = template.special[template.image_token]
    flat = [i for item in ids for i in ([item] if isinstance(item, int) else [image_id] * len(features))]
    info = vision.info
    return Trace(
        pixel_shape=(3, *pixels.shape[:2]),
        grid=(info.grid, info.grid),
        vision_shape=(info.n_patches, info.vision_width),
        feature_shape=(features.shape[0], features.shape[1]),
        image_positions=(first, last),
        token_ids=tuple(flat),
        token_texts=tuple(_text(llama, i) for i in flat),
        embeddings_match=difference <= TOLERANCE,
        max_difference=difference,
        class_token_corrected=vision.correction.corrected > corrected,
    )


def _evaluate(llama: Any, ids: list[int | ImagePlace], features: Features) -> Features:
    """The first block's normalized input at every position of the prompt, (n_positions, n_embd)."""
    import ctypes

    watcher = FirstNorm(llama.n_embd())
    n = len(ids) - 1 + len(features)
    params = llama_cpp.llama_context_default_params()
    ctypes.pointer(params)[0] = llama.context_params
    params.n_ctx = -(-(n + 1) // CONTEXT_STEP) * CONTEXT_STEP
    params.cb_eval, params.cb_eval_user_data = watcher.callback, None
    context = llama_cpp.llama_init_from_model(llama.model, params)
    if not context:
        raise BackendError("trace: no second context could be made; free some memory")
    try:
        position = 0
        for item in ids:
            watcher.start()
            if isinstance(item, ImagePlace):
                decode_features(context, features, position, params.n_batch)
                position += len(features)
                continue
            token = (llama_cpp.llama_token * 1)(item)
            if code := llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)):
                raise BackendError(f"trace: llama_decode: code {code} at position {position}")
            position += 1
    finally:
        llama_cpp.llama_free(context)
    return watcher.rows


def _normalized(rows: Features, eps: float) -> Features:
    """RMS norm without weights: x / sqrt(mean(x^2) + eps), row by row."""
    wide = rows.astype(np.float64)
    scale = np.sqrt(np.mean(np.square(wide), axis=1, keepdims=True) + eps)
    return np.asarray(wide / scale, dtype=np.float32)


def _text(llama: Any, token: int) -> str:
    return str(llama_cpp.llama_vocab_get_text(llama._model.vocab, token).decode("utf-8", "replace"))

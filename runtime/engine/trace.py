"""One picture followed through the model, from a real evaluation whose graph is read on the way.

The text model's first block normalizes its input (RMS norm, before any weight); that node is read at the
image's positions in a context of its own and compared with the image features, normalized the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocketllava.engine.session import Session
from pocketllava.errors import BackendError, InputError
from pocketllava.llamacpp.guard import EvalCallback, translated
from pocketllava.llamacpp.library import Node
from pocketllava.llamacpp.second_context import SecondContext
from pocketllava.models.tiling import TileLayout
from pocketllava.prompt.items import ImageSpan, PromptItem, n_positions, position_ids, runs
from pocketllava.types import Message, Trace
from pocketllava.vision.feature_cache import Features

FIRST_NORM = b"norm-0"  # llm_graph_context::build_norm names the node "norm", block 0
TOLERANCE = 1e-4


class FirstNorm(EvalCallback):
    """Collects the first block's normalized input, (n_positions, n_embd), batch by batch."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.rows = np.empty((0, n_embd), np.float32)
        self._waiting = False

    def begin(self) -> None:
        """Before each batch."""
        self._waiting = True

    def wants(self, node: Node) -> bool:
        """The first node of that name in each graph; the block's second norm has it, too."""
        return self._waiting and node.name == FIRST_NORM

    def see(self, node: Node) -> None:
        """Take its rows."""
        self._waiting = False
        self.rows = np.concatenate([self.rows, node.rows(self.rows.shape[1])])


def trace(session: Session, messages: Sequence[Message], *, image_tokens: int | None = None) -> Trace:
    """Evaluate a conversation with one picture in a context of its own. Raises InputError, BackendError."""
    images = [image for message in messages for image in message.images]
    if len(images) != 1:
        raise InputError(f"trace: found {len(images)} images, expected 1")
    image = session.images.process(images[0]).with_tokens(image_tokens or session.image_tokens)
    vision, text = session.vision, session.text
    corrected = vision.correction.corrected
    features = session.encode_anew(image)
    prompt = session.count(messages, image_tokens=image_tokens)
    first = next(n for n, item in enumerate(prompt) if isinstance(item, ImageSpan))
    last = first + len(features) - 1
    with translated("tracing the image"):
        rows = _first_norm(session, prompt, features)
    if len(rows) != n_positions(prompt):
        raise BackendError(f"trace: read {len(rows)} positions of {n_positions(prompt)} from the graph")
    eps = float(text.metadata.get("llama.attention.layer_norm_rms_epsilon", 1e-5))
    difference = float(np.abs(rows[first : last + 1] - _normalized(features, eps)).max())
    ids = position_ids(prompt, session.image_id)
    info = vision.info
    return Trace(
        pixel_shape=(3, *image.tiles[0].shape[:2]),
        grid=(info.grid, info.grid),
        vision_shape=(info.n_patches, info.vision_width),
        feature_shape=(features.shape[0], features.shape[1]),
        image_positions=(first, last),
        token_ids=tuple(ids),
        token_texts=tuple(map(text.vocabulary.text, ids)),
        embeddings_match=difference <= TOLERANCE,
        max_difference=difference,
        class_token_corrected=vision.correction.corrected > corrected,
        tiles=(image.layout.rows, image.layout.columns) if image.layout else None,
        unpadded=_unpadded(image.layout) if image.layout else None,
    )


def _unpadded(layout: TileLayout) -> tuple[int, int]:
    top, bottom, left, right = layout.patches
    return bottom - top, right - left


def _first_norm(session: Session, prompt: list[PromptItem], features: Features) -> Features:
    """The first block's normalized input at every position of the prompt, (n_positions, n_embd)."""
    callback = FirstNorm(session.text.n_embd)
    with SecondContext(session.text, callback, n_ctx=n_positions(prompt) + 1) as context:
        at = 0
        for part in runs(prompt):
            if isinstance(part, ImageSpan):
                at = context.decode_features(features, at)
            else:
                at = context.decode_tokens(part, at)
    return callback.rows


def _normalized(rows: Features, eps: float) -> Features:
    """RMS norm without weights: x / sqrt(mean(x^2) + eps), row by row."""
    wide = rows.astype(np.float64)
    scale = np.sqrt(np.mean(np.square(wide), axis=1, keepdims=True) + eps)
    return np.asarray(wide / scale, dtype=np.float32)

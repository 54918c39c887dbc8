"""Reads from the tower's graph what token selection needs: the last block's queries, keys and output.

Knows the names of libmtmd's nodes (clip_graph_llava::build: Qcur-N, Kcur-N, layer_out-N) and what attention is;
chooses nothing. Reading costs three graph cuts, so it is done for the images for which `collecting` is set.
"""

from __future__ import annotations

import numpy as np

from pocketllava.errors import BackendError
from pocketllava.llamacpp.library import Node
from pocketllava.vision.class_token import ClassTokenCorrection
from pocketllava.vision.feature_cache import Features


class LastBlock(ClassTokenCorrection):
    """The class token's correction, which also collects nodes of the last block that runs."""

    def __init__(
        self, class_embedding: Features, n_patches: int, *, block: int, n_heads: int, width: int
    ) -> None:
        """block: its number in the file; n_heads, width: of the tower."""
        super().__init__(class_embedding, n_patches)
        self.collecting = False
        self._n_rows = n_patches + (class_embedding.size > 0)
        self._n_heads, self._width = n_heads, width
        self._names = {f"{name}-{block}".encode(): name for name in ("Qcur", "Kcur", "layer_out")}
        self._nodes: dict[str, Features] = {}

    def begin(self) -> None:
        """Before each image."""
        super().begin()
        self._nodes = {}

    def wants(self, node: Node) -> bool:
        """The correction's node, and the three that are collected."""
        return super().wants(node) or (self.collecting and node.name in self._names)

    def see(self, node: Node) -> None:
        """Copy a node's values, or correct them."""
        name = self._names.get(node.name)
        if name is None:
            super().see(node)
        elif name not in self._nodes:
            values = node.rows(self._width if name == "layer_out" else self._width // self._n_heads)
            self._nodes[name] = values.reshape(self._n_rows, self._width)

    def attention(self) -> Features:
        """How much attention each patch gets, summed over heads, (n_patches,): the class token's.

        A tower without a class token (SigLIP): the mean over all patches' attention.
        """
        n, heads = self._n_rows, self._n_heads
        queries = self._node("Qcur").reshape(n, heads, -1)
        keys = self._node("Kcur").reshape(n, heads, -1)
        has_class = self.class_embedding.size > 0
        if has_class:
            queries = queries[:1]
        total = np.zeros(n, np.float32)
        for head in range(heads):  # all heads at once would be 27 x 729 x 729 values for SigLIP
            scores = queries[:, head] @ keys[:, head].T / np.sqrt(np.float32(queries.shape[-1]))
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            total += (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
        return total[1:] if has_class else total

    def hidden(self) -> Features:
        """The block's output without the class token, (n_patches, width)."""
        rows = self._node("layer_out")
        return rows[1:] if self.class_embedding.size else rows

    def _node(self, name: str) -> Features:
        if name not in self._nodes:
            raise BackendError(
                f"libmtmd: no node {name} in the vision tower's last block, which image_tokens needs; leave"
                " image_tokens out, or upgrade pocketllava"
            )
        return self._nodes[name]

"""Moves the class token's row to the front of a vision tower's input, where libmtmd puts it behind the patches.

The position table and everything behind it have it in front (llama.cpp #25814). The scheduler's callback lets us roll
the rows once, after they were concatenated and before the positions are added; a library that has it right is left
alone. Knows one node of the tower's graph.
"""

from __future__ import annotations

import numpy as np

from pocketllava.errors import BackendError
from pocketllava.llamacpp.guard import EvalCallback
from pocketllava.llamacpp.library import Node
from pocketllava.vision.feature_cache import Features


class ClassTokenCorrection(EvalCallback):
    """Watches a graph's nodes and moves the class token's row to the front, if it stands at the end.

    The rows it looks at are those of the first CONCAT with n_patches + 1 rows. `corrected` and
    `left_alone` count the images for which it did and did not have to act.
    """

    def __init__(self, class_embedding: Features, n_patches: int) -> None:
        """class_embedding: (n_embd,) float32, the file's `v.class_embd`."""
        super().__init__()
        self.class_embedding, self.n_rows = class_embedding, n_patches + 1
        self.corrected = self.left_alone = 0
        self.enabled = True  # measurements of libmtmd as it is switch it off
        self._waiting = False

    def begin(self) -> None:
        """Before each image; a tower without a class token (SigLIP) has nothing to wait for."""
        self._waiting = self.enabled and self.class_embedding.size > 0

    def wants(self, node: Node) -> bool:
        """The first concatenation of the patches and the class token."""
        return self._waiting and node.operation == b"CONCAT" and node.n_rows == self.n_rows

    def see(self, node: Node) -> None:
        """Roll its rows. Raises BackendError where no class token stands at either end."""
        self._waiting = False
        rows = node.rows(self.class_embedding.size)
        if np.array_equal(rows[-1], self.class_embedding):
            node.write(np.roll(rows, 1, axis=0))
            self.corrected += 1
        elif np.array_equal(rows[0], self.class_embedding):
            self.left_alone += 1
        else:
            raise BackendError(
                "libmtmd: no class token at either end of the patch embeddings; upgrade pocketllava"
            )

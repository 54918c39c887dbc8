"""Squared activations summed by input column, read from the graph while real prompts are evaluated.

The same sums as llama.cpp's llama-imatrix: src1 of every matrix product with a weight of a block, or with the
output matrix. Evaluates in a context of its own; knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from pocketllava.engine.session import Session
from pocketllava.errors import BackendError, ContextOverflow
from pocketllava.llamacpp.guard import EvalCallback
from pocketllava.llamacpp.library import Node
from pocketllava.llamacpp.second_context import SecondContext
from pocketllava.llamacpp.tensors import Product, mul_mat_op, product
from pocketllava.prompt.items import ImageSpan, n_positions, runs
from pocketllava.types import Message

Column = npt.NDArray[np.float64]


class SquareSums(EvalCallback):
    """Sums of squares (n_columns,) by tensor name, with the number of rows."""

    def __init__(self) -> None:
        super().__init__()
        mul_mat_op()  # raises BackendError where ggml has another layout
        self.by_name: dict[str, tuple[Column, int]] = {}
        self._last: tuple[Node, Column] | None = None

    def begin(self) -> None:
        """Before each batch."""
        self._last = None

    def wants(self, node: Node) -> bool:
        """Products with a weight of a block, or with the output matrix."""
        return self._weight(node) is not None

    def see(self, node: Node) -> None:
        """Add the squares of the product's input; several matrices take one (q, k and v), summed once."""
        if (multiplied := self._weight(node)) is None:
            return
        name = _plain(multiplied.weight)
        if self._last is None or self._last[0] != multiplied.input:
            self._last = multiplied.input, _squares(multiplied, name)
        sums, n_rows = self.by_name.get(name, (np.zeros(multiplied.n_columns), 0))
        if sums.size != multiplied.n_columns:
            raise BackendError(f"imatrix: {name} takes {multiplied.n_columns} columns, before {sums.size}")
        self.by_name[name] = sums + self._last[1], n_rows + multiplied.input.n_rows

    @staticmethod
    def _weight(node: Node) -> Product | None:
        multiplied = product(node)
        if multiplied is None:
            return None
        name = _plain(multiplied.weight)
        return multiplied if name.startswith("blk.") or name == "output.weight" else None


class Activations:
    """Evaluates prompts and sums what their activations are; a context manager."""

    def __init__(self, session: Session) -> None:
        """Raises BackendError when there is no room for a second context, or ggml has another layout."""
        self._session, self._sums = session, SquareSums()
        # logits at every position: otherwise the last block and the output skip rows
        self._context = SecondContext(session.text, self._sums, all_logits=True)
        self.positions = 0

    @property
    def sums(self) -> dict[str, tuple[Column, int]]:
        """Sums of squares (n_columns,) float64 and counts of rows, by tensor name."""
        return self._sums.by_name

    def __enter__(self) -> Activations:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)

    def text(self, ids: Sequence[int]) -> int:
        """Evaluate token ids from an empty cache; returns how many positions."""
        self._context.clear()
        self.positions += len(ids)
        return self._context.decode_tokens(ids, 0)

    def chat(self, messages: Sequence[Message], answer_tokens: int) -> int:
        """Evaluate a conversation and up to so many tokens of the model's greedy answer; returns the positions."""
        images = [image for message in messages for image in message.images]
        features = iter([self._session.image_features(image) for image in images])
        prompt = self._session.count(messages)
        if (needed := n_positions(prompt)) >= self._context.n_ctx:
            raise ContextOverflow(needed, self._context.n_ctx)
        self._context.clear()
        at = 0
        for part in runs(prompt):
            if isinstance(part, ImageSpan):
                at = self._context.decode_features(next(features), at)
            else:
                at = self._context.decode_tokens(part, at)
        at = self._answer(at, min(answer_tokens, self._context.n_ctx - at))
        self.positions += at
        return at

    def _answer(self, at: int, n_tokens: int) -> int:
        for _ in range(n_tokens):
            token = int(self._context.logits().argmax())
            if self._session.text.vocabulary.is_end(token):
                break
            at = self._context.decode_tokens([token], at)
        return at


def _squares(multiplied: Product, name: str) -> Column:
    """Sums of squares (n_columns,) of a float32 input, wherever its memory is."""
    if not multiplied.contiguous_f32:
        raise BackendError(f"imatrix: the input of {name} is not contiguous float32; upgrade pocketllava")
    sums: Column = np.square(multiplied.input.rows(multiplied.n_columns), dtype=np.float64).sum(axis=0)
    if not np.isfinite(sums).all():
        raise BackendError(
            f"imatrix: the input of {name} holds values that are no numbers; the model is damaged"
        )
    return sums


def _plain(name: str) -> str:
    """ "CUDA0#blk.0.attn_k.weight#0", a copy that the scheduler made, is blk.0.attn_k.weight."""
    return name.split("#")[1] if "#" in name else name

"""Squared activations summed by input column, read from the graph while real prompts are evaluated.

The same sums as llama.cpp's llama-imatrix: src1 of every matrix product with a weight of a block, or with the
output matrix. Knows the loaded model, in a context of its own, and ggml's nodes; no files.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError, ContextOverflow
from pocketllava.llamacpp.backend import ggml
from pocketllava.llamacpp.tensors import F32, Tensor, mul_mat_op, tensor_at
from pocketllava.prompt.template import ImagePlace
from pocketllava.types import Message

if TYPE_CHECKING:
    from pocketllava.llava import Llava

Column = npt.NDArray[np.float64]


class Sums:
    """Sums of squares by tensor name, with the number of rows; a context manager that holds a llama context."""

    def __init__(self, llava: Llava) -> None:
        """Raises BackendError when there is no room for a second context, or ggml has another layout."""
        from llama_cpp import llama_cpp

        self._lib, self._llama, self._handler = llama_cpp, llava._llama, llava._handler
        self._eos = set(llava.bundle.manifest["eos_token_ids"])
        self.sums: dict[str, tuple[Column, int]] = {}
        self.positions = 0
        self._product = mul_mat_op()
        self._error: Exception | None = None
        self._last: tuple[int, Column] | None = None
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)
        params = llama_cpp.llama_context_default_params()
        ctypes.pointer(params)[0] = self._llama.context_params
        params.cb_eval, params.cb_eval_user_data = self._callback, None
        self._n_batch, self._n_ctx = params.n_batch, params.n_ctx
        self._context = llama_cpp.llama_init_from_model(self._llama.model, params)
        if not self._context:
            raise BackendError("imatrix: no second context could be made; free some memory")

    def __enter__(self) -> Sums:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lib.llama_free(self._context)

    def text(self, ids: Sequence[int]) -> int:
        """Evaluate token ids from an empty cache; returns how many positions."""
        self._clear()
        return self._tokens(ids, 0)

    def chat(self, messages: Sequence[Message], answer_tokens: int) -> int:
        """Evaluate a conversation and up to so many tokens of the model's greedy answer; returns the positions."""
        items = self._handler.prompt_ids(self._llama, messages)
        images = [image for message in messages for image in message.images]
        features = [
            self._handler.features(self._llama, p) for p in self._handler.prepare(self._llama, images)
        ]
        needed = sum(1 if isinstance(i, int) else len(features[i.index]) for i in items)
        if needed >= self._n_ctx:
            raise ContextOverflow(needed, self._n_ctx)
        self._clear()
        at = 0
        for run in _runs(items):
            at = self._tokens(run, at) if isinstance(run, list) else self._rows(features[run.index], at)
        return self._answer(at, min(answer_tokens, self._n_ctx - at))

    def _answer(self, at: int, n_tokens: int) -> int:
        for _ in range(n_tokens):
            logits = self._lib.llama_get_logits_ith(self._context, -1)
            token = int(np.ctypeslib.as_array(logits, (self._llama.n_vocab(),)).argmax())
            if token in self._eos:
                break
            at = self._tokens([token], at)
        return at

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _tokens(self, ids: Sequence[int], at: int) -> int:
        for start in range(0, len(ids), self._n_batch):
            part = ids[start : start + self._n_batch]
            self._decode(len(part), at + start, tokens=(self._lib.llama_token * len(part))(*part))
        return at + len(ids)

    def _rows(self, features: npt.NDArray[np.float32], at: int) -> int:
        for start in range(0, len(features), self._n_batch):
            part = np.ascontiguousarray(features[start : start + self._n_batch], np.float32)
            self._decode(len(part), at + start, rows=part)
        return at + len(features)

    def _decode(self, n: int, at: int, *, tokens: Any = None, rows: Any = None) -> None:
        """One batch with logits at every position: otherwise the last block and the output skip rows."""
        lib = self._lib
        pointer = ctypes.POINTER(lib.llama_seq_id)
        sequence = (lib.llama_seq_id * 1)(0)
        arrays = (  # referenced until llama_decode returns
            (lib.llama_pos * n)(*range(at, at + n)),
            (ctypes.c_int32 * n)(*[1] * n),
            (pointer * n)(*[ctypes.cast(sequence, pointer)] * n),
            (ctypes.c_int8 * n)(*[1] * n),
        )
        embeddings = None if rows is None else rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._last = None
        code = lib.llama_decode(self._context, lib.llama_batch(n, tokens, embeddings, *arrays))
        if self._error is not None:
            raise self._error
        if code:
            raise BackendError(f"imatrix: llama_decode: code {code} for {n} positions from {at}")
        self.positions += n

    def _on_node(self, node: int, ask: bool, _user_data: Any) -> bool:
        try:
            tensor = tensor_at(node)
            if tensor.op != self._product or self._error is not None:
                return not ask
            name = _plain(tensor_at(tensor.src[0]).name.decode("utf-8", "replace"))
            if not (name.startswith("blk.") or name == "output.weight"):
                return not ask
            if not ask:
                self._add(name, tensor.src[1])
        except Exception as error:  # must not escape into C; raised after the call
            self._error = error
        return True

    def _add(self, name: str, address: int) -> None:
        """Several matrices take one input (q, k and v): its squares are summed once."""
        rows = tensor_at(address)
        if self._last is None or self._last[0] != address:
            self._last = address, _squares(rows, address, name)
        n_rows = int(ggml().ggml_nrows(address))
        before, count = self.sums.get(name, (np.zeros(rows.ne[0]), 0))
        if before.size != rows.ne[0]:
            raise BackendError(f"imatrix: {name} takes {rows.ne[0]} columns, before it took {before.size}")
        self.sums[name] = before + self._last[1], count + n_rows


def _runs(items: Sequence[int | ImagePlace]) -> Iterator[list[int] | ImagePlace]:
    """Text between images as lists, images as they are."""
    run: list[int] = []
    for item in items:
        if isinstance(item, int):
            run.append(item)
            continue
        if run:
            yield run
        yield item
        run = []
    if run:
        yield run


def _squares(tensor: Tensor, address: int, name: str) -> Column:
    """Sums of squares by column of a float32 tensor, wherever its memory is."""
    rows = np.empty((int(ggml().ggml_nrows(address)), tensor.ne[0]), np.float32)
    if tensor.type != F32 or tensor.nb[1] != tensor.ne[0] * 4 or ggml().ggml_nbytes(address) != rows.nbytes:
        raise BackendError(f"imatrix: the input of {name} is not contiguous float32; upgrade pocketllava")
    ggml().ggml_backend_tensor_get(address, rows.ctypes.data, 0, rows.nbytes)
    sums: Column = np.square(rows, dtype=np.float64).sum(axis=0)
    if not np.isfinite(sums).all():
        raise BackendError(
            f"imatrix: the input of {name} holds values that are no numbers; the model is damaged"
        )
    return sums


def _plain(name: str) -> str:
    """ "CUDA0#blk.0.attn_k.weight#0", a copy that the scheduler made, is blk.0.attn_k.weight."""
    return name.split("#")[1] if "#" in name else name

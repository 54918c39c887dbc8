"""A loaded model's tokens: their bytes, and which of them end an answer. Knows llama_vocab and nothing above it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

PIECE_BYTES = 1024


class Tokens:
    """Looked up once each: at a few hundred tokens a second the calls would be felt."""

    def __init__(self, vocab: Any, ends: Iterable[int] = ()) -> None:
        """vocab: a llama_vocab that outlives this object. ends: end-of-sequence ids beside the vocabulary's own."""
        self._vocab, self._ends = vocab, set(ends)
        self._known: dict[int, tuple[bytes, bool]] = {}

    def piece(self, token: int) -> bytes:
        """A token's bytes; none for a control token."""
        return self._look_up(token)[0]

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return self._look_up(token)[1]

    def _look_up(self, token: int) -> tuple[bytes, bool]:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._bytes_of(token), self._ends_answer(token)
        return found

    def _bytes_of(self, token: int) -> bytes:
        """llama_cpp's own detokenizer cuts pieces off at 32 bytes."""
        from llama_cpp import llama_cpp

        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, PIECE_BYTES, 0, False)
        return buffer.raw[: max(0, n)]

    def _ends_answer(self, token: int) -> bool:
        from llama_cpp import llama_cpp

        return token in self._ends or bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

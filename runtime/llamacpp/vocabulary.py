"""A loaded model's tokens: their texts and bytes, and which of them are special or end an answer.

Knows llama_vocab and nothing above it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cached_property
from typing import Any

PIECE_BYTES = 1024
UNKNOWN = 1 << 0  # llama.h
SPECIAL = UNKNOWN | 1 << 3  # llama.h, LLAMA_TOKEN_ATTR_UNKNOWN and LLAMA_TOKEN_ATTR_CONTROL


class Vocabulary:
    """Looks tokens up once each: at a few hundred tokens a second the calls would be felt."""

    def __init__(self, vocab: Any, end_ids: Iterable[int] = ()) -> None:
        """vocab: a llama_vocab that outlives this object. end_ids: ends of an answer beside the vocabulary's own."""
        self.pointer = self._vocab = vocab
        self._end_ids = set(end_ids)
        self._cache: dict[int, tuple[bytes, bool]] = {}

    def piece(self, token: int) -> bytes:
        """A token's bytes; none for a control token."""
        return self._look_up(token)[0]

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return self._look_up(token)[1]

    def text(self, token: int) -> str:
        """A token as the vocabulary writes it, such as "▁a" or "</s>"."""
        from llama_cpp import llama_cpp

        return str(llama_cpp.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"))

    def special(self) -> dict[str, int]:
        """Control tokens and <unk> by their text: what a template may write and a user may not."""
        from llama_cpp import llama_cpp

        return {
            self.text(i): i
            for i in range(self._n_tokens)
            if llama_cpp.llama_vocab_get_attr(self._vocab, i) & SPECIAL
        }

    def ends(self) -> list[int]:
        """The ids that end an answer."""
        return [i for i in range(self._n_tokens) if self._ends_answer(i)]

    def unknown(self) -> list[int]:
        """The ids that stand for what the vocabulary cannot write: they have a text, but no bytes."""
        from llama_cpp import llama_cpp

        n = self._n_tokens
        return [i for i in range(n) if llama_cpp.llama_vocab_get_attr(self._vocab, i) & UNKNOWN]

    @cached_property
    def longest_bytes(self) -> int:
        """Bytes of the longest token: a text of n bytes takes at least n / longest_bytes tokens."""
        return max((len(self.text(i).encode()) for i in range(self._n_tokens)), default=1) or 1

    @property
    def adds_bos(self) -> bool:
        """Whether prompts begin with BOS."""
        from llama_cpp import llama_cpp

        return bool(llama_cpp.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos(self) -> int:
        """The begin-of-sequence token's id, -1 where there is none."""
        from llama_cpp import llama_cpp

        return int(llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int:
        """The end-of-sequence token's id, -1 where there is none."""
        from llama_cpp import llama_cpp

        return int(llama_cpp.llama_vocab_eos(self._vocab))

    @property
    def _n_tokens(self) -> int:
        from llama_cpp import llama_cpp

        return int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    def _look_up(self, token: int) -> tuple[bytes, bool]:
        entry = self._cache.get(token)
        if entry is None:
            entry = self._cache[token] = self._bytes_of(token), self._ends_answer(token)
        return entry

    def _bytes_of(self, token: int) -> bytes:
        """llama_cpp's own detokenizer cuts pieces off at 32 bytes."""
        from llama_cpp import llama_cpp

        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, PIECE_BYTES, 0, False)
        return buffer.raw[: max(0, n)]

    def _ends_answer(self, token: int) -> bool:
        from llama_cpp import llama_cpp

        return token in self._end_ids or bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

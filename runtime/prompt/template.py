"""Messages -> runs of text, special tokens and image spans, by the checkpoint's own chat template -> token ids.

Knows which texts are special and which get a space; models/chat_template.py renders. No engine (a tokenizer is a
function it is given) and no pixels. What a user writes stays text: special tokens and image markers count only where
the template itself writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pocketllava.errors import BackendError, InputError
from pocketllava.models import chat_template
from pocketllava.prompt.items import ImageSpan, PromptItem
from pocketllava.types import Beginning, Message

Tokenize = Callable[[str], Sequence[int]]  # text -> ids, special tokens not parsed, no BOS
SENTINEL = "\U0010fffc"  # stands for an answer, to see what the template writes before it
ANCHOR = "\n"  # a text that no SentencePiece merge crosses


@dataclass(frozen=True)
class Template:
    """A chat template and what it may write: special tokens by text, one of them the image token.

    tokens: special tokens by the names that templates know, such as pad_token, beside bos and eos. strip: special
    tokens that swallow white space beside them ("left", "right" or "both").
    """

    source: str
    special: Mapping[str, int]
    image_token: str
    bos: str
    eos: str
    add_bos: bool
    space_prefix: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    strip: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise BundleError unless the template renders conversations with and without images, in bounded time."""
        chat_template.check(self.source, self.image_token, self._named)

    def pieces(self, messages: Sequence[Message], spans: Sequence[ImageSpan]) -> list[str | PromptItem]:
        """Render a conversation: runs of text, special tokens' ids and the spans of its images, one each.

        Raises InputError for one without turns, or whose images do not appear.
        """
        written = self._written(messages, spans)
        return [self.special[self.bos], *written] if self._needs_bos(written) else written

    def _needs_bos(self, written: Sequence[str | PromptItem]) -> bool:
        return self.add_bos and written[:1] != [self.special.get(self.bos)]

    def _written(self, messages: Sequence[Message], spans: Sequence[ImageSpan]) -> list[str | PromptItem]:
        if messages and isinstance(messages[-1], Beginning):
            return self._begun(messages[:-1], messages[-1].text.rstrip(), spans)
        if not messages:
            raise InputError("conversation: found no messages, expected at least one")
        guard = _guard([m.text for m in messages])
        turns = [_as_dict(m, lambda t: self._shield(t, guard)) for m in messages]
        text = chat_template.render(self.source, turns, self._named)
        pieces: list[str | PromptItem] = []
        n_images = 0
        for run in self._stripped(list(self._runs(text))):
            if run == self.image_token:
                pieces.extend(spans[n_images : n_images + 1])
                n_images += 1
            elif run in self.special:
                pieces.append(self.special[run])
            else:
                pieces.append(run.replace(guard, ""))
        if n_images != len(spans):
            raise InputError(f"chat template: it shows {n_images} of the conversation's {len(spans)} images")
        return pieces

    def _begun(
        self, messages: Sequence[Message], text: str, spans: Sequence[ImageSpan]
    ) -> list[str | PromptItem]:
        """A prompt with the answer's beginning, in one run with what comes before it: tokens as in a whole answer."""
        pieces = self._written(messages, spans)
        if pieces and isinstance(pieces[-1], str):
            return [*pieces[:-1], f"{pieces[-1]}{self._before_answer(messages, pieces[-1])}{text}"]
        return [*pieces, text]

    def _before_answer(self, messages: Sequence[Message], last: str) -> str:
        """The white space that the template writes between the prompt and an answer."""
        turns = [_as_dict(m, lambda _: "") for m in messages]
        prompt = chat_template.render(self.source, turns, self._named)
        answer = _as_dict(Message("assistant", SENTINEL), str)
        whole = chat_template.render(self.source, [*turns, answer], self._named)
        between = whole.removeprefix(prompt).partition(SENTINEL)[0]
        if whole.startswith(prompt) and not between.strip():
            return between
        return "" if last[-1:].isspace() else " "

    @property
    def _named(self) -> dict[str, str]:
        return {"bos_token": self.bos, "eos_token": self.eos, **self.tokens}

    def _stripped(self, runs: list[str]) -> list[str]:
        """Without the white space that special tokens swallow, whoever wrote it."""
        for n, run in enumerate(runs):
            side = self.strip.get(run, "") if run in self.special else ""
            if side in ("left", "both") and n and runs[n - 1] not in self.special:
                runs[n - 1] = runs[n - 1].rstrip()
            if side in ("right", "both") and n + 1 < len(runs) and runs[n + 1] not in self.special:
                runs[n + 1] = runs[n + 1].lstrip()
        return [run for run in runs if run]

    def prompt(
        self, messages: Sequence[Message], spans: Sequence[ImageSpan], tokenize: Tokenize
    ) -> list[PromptItem]:
        """A conversation's token ids, with the spans where its images stand. Raises as pieces() does."""
        written = self._written(messages, spans)
        items: list[PromptItem] = [self.special[self.bos]] if self._needs_bos(written) else []
        first = True
        for piece in written:
            if isinstance(piece, str):
                prefixed = self._prefixed(piece, first)
                items.extend(tokenize(piece) if prefixed else without_prefix(piece, tokenize))
            else:
                items.append(piece)
            first = isinstance(piece, ImageSpan) and self.space_prefix == "chunk"
        return items

    def _prefixed(self, text: str, first: bool) -> bool:
        """Whether a run of text gets the tokenizer's leading space (llama.cpp adds it to every run).

        first: it stands where the prompt starts, or after an image where each chunk is tokenized by itself. With
        "first", a space that is there already is enough (tokenizers, Metaspace).
        """
        if self.space_prefix == "first":
            return first and not text.startswith((" ", "▁"))
        return self.space_prefix != "chunk" or first

    def _shield(self, text: str, guard: str) -> str:
        """Break up anything in a user's text that could be read as special, reversibly."""
        starts = "".join(sorted({re.escape(s[0]) for s in self.special if s}))
        return re.sub(f"([{starts}])", lambda m: m.group(1) + guard, text) if starts else text

    def _runs(self, text: str) -> Iterator[str]:
        longest_first = sorted(self.special, key=len, reverse=True)
        pattern = "|".join(re.escape(s) for s in longest_first)
        return (run for run in re.split(f"({pattern})", text) if run)


def without_prefix(text: str, tokenize: Tokenize) -> list[int]:
    """Tokenize without the leading space that llama.cpp puts before every run of text."""
    anchor, ids = list(tokenize(ANCHOR)), list(tokenize(ANCHOR + text))
    if ids[: len(anchor)] != anchor:
        raise BackendError(
            "tokenizer: merges across a line break, so text after an image cannot be tokenized"
        )
    return ids[len(anchor) :]


def _as_dict(message: Message, shield: Callable[[str], str]) -> dict[str, Any]:
    """The shape that processors' templates expect: content as a list of parts, images first."""
    parts: list[dict[str, str]] = [{"type": "image"} for _ in message.images]
    return {"role": message.role, "content": [*parts, {"type": "text", "text": shield(message.text)}]}


def _guard(texts: Sequence[str]) -> str:
    """A run of a private-use character that none of the texts holds."""
    guard = "\U0010fffd"
    while any(guard in text for text in texts):
        guard += "\U0010fffd"
    return guard

"""Messages -> runs of text, special tokens and image spans, by the checkpoint's own chat template -> token ids.

Knows Jinja templates and which texts are special; no engine (a tokenizer is a function it is given) and
no pixels. What a user writes stays text: special tokens and image markers count only where the template
itself writes them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocketllava.errors import BackendError, BundleError, InputError
from pocketllava.llamacpp.private import private
from pocketllava.prompt.items import ImageSpan, PromptItem
from pocketllava.types import Message

Tokenize = Callable[[str], Sequence[int]]  # text -> ids, special tokens not parsed, no BOS
ANCHOR = "\n"  # a text that no SentencePiece merge crosses


@dataclass(frozen=True)
class Template:
    """A chat template and what it may write: special tokens by text, one of them the image token."""

    source: str
    special: Mapping[str, int]
    image_token: str
    bos: str
    eos: str
    add_bos: bool
    space_prefix: str

    def pieces(self, messages: Sequence[Message], spans: Sequence[ImageSpan]) -> list[str | PromptItem]:
        """Render a conversation: runs of text, special tokens' ids and the spans of its images, one each.

        Raises InputError for one without turns, or whose images do not appear.
        """
        if not messages:
            raise InputError("conversation: found no messages, expected at least one")
        guard = _guard([m.text for m in messages])
        text = self._render([_as_dict(m, lambda t: self._shield(t, guard)) for m in messages])
        pieces: list[str | PromptItem] = []
        n_images = 0
        for run in self._runs(text):
            if run == self.image_token:
                pieces.extend(spans[n_images : n_images + 1])
                n_images += 1
            elif run in self.special:
                pieces.append(self.special[run])
            else:
                pieces.append(run.replace(guard, ""))
        if n_images != len(spans):
            raise InputError(f"chat template: it shows {n_images} of the conversation's {len(spans)} images")
        if self.add_bos and pieces[:1] != [self.special.get(self.bos)]:
            pieces.insert(0, self.special[self.bos])
        return pieces

    def prompt(
        self, messages: Sequence[Message], spans: Sequence[ImageSpan], tokenize: Tokenize
    ) -> list[PromptItem]:
        """A conversation's token ids, with the spans where its images stand. Raises as pieces() does."""
        items: list[PromptItem] = []
        first = True
        for piece in self.pieces(messages, spans):
            if not isinstance(piece, str):
                first = self._begins_anew(piece, first)
                items.append(piece)
                continue
            items.extend(tokenize(piece) if self._prefixed(first) else without_prefix(piece, tokenize))
            first = False
        return items

    def _prefixed(self, first: bool) -> bool:
        """Whether a run of text gets the tokenizer's leading space (llama.cpp adds it to every run)."""
        return self.space_prefix not in ("first", "chunk") or first

    def _begins_anew(self, piece: PromptItem, first: bool) -> bool:
        """Whether text after this piece stands at the start: after BOS, and after an image if chunks do."""
        if isinstance(piece, ImageSpan):
            return self.space_prefix == "chunk"
        return first and piece == self.special.get(self.bos)

    def _shield(self, text: str, guard: str) -> str:
        """Break up anything in a user's text that could be read as special, reversibly."""
        starts = "".join(sorted({re.escape(s[0]) for s in self.special if s}))
        return re.sub(f"([{starts}])", lambda m: m.group(1) + guard, text) if starts else text

    def _runs(self, text: str) -> Iterator[str]:
        longest_first = sorted(self.special, key=len, reverse=True)
        pattern = "|".join(re.escape(s) for s in longest_first)
        return (run for run in re.split(f"({pattern})", text) if run)

    def _render(self, messages: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        try:
            template = _compiled(self.source)
            return str(
                template.render(
                    messages=messages, add_generation_prompt=True, bos_token=self.bos, eos_token=self.eos
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
            raise BundleError(f"chat template: cannot be rendered ({error})") from error


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


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """A jinja2 template: compiling it takes as long as tokenizing a page."""
    return _environment().from_string(source)


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates, sandboxed."""
    import json

    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise InputError(f"chat template: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[
            loopcontrols,
            private("llama_cpp.llama_chat_format", "Jinja2ChatFormatter").IgnoreGenerationTags,
        ],
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)
    return environment

"""JSON schemas -> which tokens may come next. The one file that knows llguidance; no sampling, no KV cache.

llama.cpp's own converter of schemas is not used: it ends the process on six kinds of hostile schema.
"""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketllava.errors import UnsupportedOption, UnsupportedSchema
from pocketllava.json_schema import Schema, bounded
from pocketllava.llamacpp.text_model import TextModel

if TYPE_CHECKING:
    from pocketllava.llamacpp.sampling import Ids

COMPILE_S = 2.0  # a record of ten fields takes a millisecond, one of 1,500 optional fields 0.7 s
# The first piece of a Llama tokenizer's answer is "▁{" or "▁[": without a space before it, JSON would have to begin
# with a token that the model was never trained to begin with. AnswerText drops the space.
LARK = 'start: " "? value\nvalue: %json '
# Compact, because small models print white space for ever; and no \\uXXXX, which can write half of a character.
WRITING = {"whitespace_flexible": False, "json_allowed_escapes": 'nrbtf\\"'}


class Grammars:
    """Grammars for one text model's vocabulary. Drop it, and what it gave, before the model is closed."""

    def __init__(self, text: TextModel) -> None:
        """Takes a quarter of a second for 32,000 tokens. Raises UnsupportedOption without llguidance."""
        try:
            from llguidance.llamacpp import lltokenizer_from_vocab
        except ImportError as error:
            raise UnsupportedOption(
                'schema: it needs llguidance; install it with pip install "pocketllava[structured]"'
            ) from error
        vocabulary = text.vocabulary
        ends = vocabulary.ends()
        if not ends:
            raise UnsupportedOption(
                "schema: the model's vocabulary has no end token, expected one to end the JSON"
            )
        with warnings.catch_warnings():  # it calls llama_token_get_attr, which llama_cpp calls deprecated
            warnings.simplefilter("ignore", DeprecationWarning)
            self._tokenizer = lltokenizer_from_vocab(vocabulary.pointer, text.n_vocab, ends)
        self._n_vocab = text.n_vocab
        self._unwritten = np.array(
            vocabulary.unknown(), np.int64
        )  # llguidance takes "<unk>" for these five letters

    def constraint(self, schema: Schema) -> Constraint:
        """A schema at the beginning of an answer. Raises UnsupportedSchema."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        text = json.dumps({**bounded(schema), "x-guidance": WRITING})
        grammar = LLMatcher.grammar_from_lark(LARK + text)

        def compiled() -> Constraint:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
            constraint = Constraint(matcher, self._n_vocab, self._unwritten)
            constraint.check_beginning()
            return constraint

        return _within_budget(compiled)


class Constraint:
    """One answer's place in its grammar. Every method raises UnsupportedSchema once llguidance gives up."""

    def __init__(self, matcher: Any, n_vocab: int, unwritten: Any) -> None:
        self._matcher, self._n_vocab, self._unwritten = matcher, n_vocab, unwritten

    @property
    def complete(self) -> bool:
        """Whether the JSON is whole, and nothing may follow it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def allowed(self) -> Ids:
        """Ids of the tokens that may come next, at least one; an end token where the JSON may end."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        bits = np.unpackbits(mask, bitorder="little")[: self._n_vocab]
        bits[self._unwritten] = 0
        ids = np.flatnonzero(bits).astype(np.int32)
        if not len(ids):
            raise UnsupportedSchema("schema: no JSON fits it, expected a schema that some value fits")
        return ids

    def check_beginning(self) -> None:
        """Raise UnsupportedSchema where nothing can be written but the space before the JSON."""
        if len(ids := self.allowed()) == 1:
            after = Constraint(self._matcher.deep_copy(), self._n_vocab, self._unwritten)
            after.consume([int(ids[0])])
            after.allowed()

    def consume(self, tokens: Sequence[int]) -> None:
        """Go on behind tokens, of which each was allowed."""
        self._matcher.consume_tokens(list(tokens))
        self._check()

    def forced(self) -> list[int]:
        """Tokens that can only be these, such as the next property's name, as the tokenizer writes them."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UnsupportedSchema(f"schema: {_reason(self._matcher.get_error())}")


def _within_budget(compiled: Callable[[], Constraint]) -> Constraint:
    """compiled()'s result. Raises what it raises, UnsupportedSchema if it takes too long.

    llguidance cannot be interrupted, so its thread is left to itself then; json_schema's limits keep that rare.
    """
    results: list[Constraint] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(compiled())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="pocketllava schema", daemon=True)
    thread.start()
    thread.join(COMPILE_S)
    if errors:
        raise errors[0]
    if not results:
        raise UnsupportedSchema(f"schema: not compiled within {COMPILE_S:g} s, expected a simpler one")
    return results[0]


def _reason(error: str) -> str:
    """llguidance's reason, without its place in our own grammar and the lines that quote it."""
    reason = " ".join(re.split(r"\n\s*1 \| start:|<non-verbose/>", error)[0].split())
    reason = reason.partition("failed to compile JSON schema: ")[2] or reason
    if "oneOf" in reason:
        return "oneOf: its schemas may overlap, expected some that tell themselves apart; use anyOf"
    if not reason or reason.startswith("NoExtension"):
        return "no JSON fits it, expected a schema that some value fits"
    return f"{reason}; leave it out or simplify it"

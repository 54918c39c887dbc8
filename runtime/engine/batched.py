"""Many conversations, answered several at once: each in a sequence of its own, all decoded in one batch a token.

Knows prompts, Sequences and when an answer ends; not where the conversations come from. A weight that is read once
serves every answer, so decoding speeds up; pictures are still encoded and evaluated one after another. What a sequence
holds of the next prompt's beginning stays, such as a system message. Equal prompts are answered once.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from pocketllava.engine.answer_text import AnswerText
from pocketllava.engine.generation import settings
from pocketllava.engine.local import Call, begun_by, room_for
from pocketllava.engine.logprobs import token_logprob
from pocketllava.engine.session import Composed, Session
from pocketllava.errors import InputError, PocketLlavaError
from pocketllava.llamacpp.guard import Interrupted, translated
from pocketllava.llamacpp.sampling import Sampler
from pocketllava.llamacpp.sequences import Sequences
from pocketllava.prompt.items import ImageSpan, PromptItem, n_positions, runs, shared
from pocketllava.types import Answer, FinishReason, Message, Timings, TokenLogprob

Job = tuple[int, Sequence[Message] | PocketLlavaError]  # a number, and a conversation, or why there is none
Logits = npt.NDArray[np.float32]
REMEMBERED = 256  # answers, for equal prompts that come later


@dataclass
class _Answering:
    """An answer that is being decoded, and what it took so far. numbers: of all whose prompt this is."""

    numbers: list[int]
    composed: Composed
    sampler: Sampler
    limit: int
    text: AnswerText
    timings: Timings
    start: float
    next_id: int = -1
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0
    finish: FinishReason | None = None

    @property
    def position(self) -> int:
        """Of the token that was sampled last."""
        return n_positions(self.composed.prompt) + len(self.ids) - 1

    def answer(self) -> Answer:
        """The whole of it."""
        assert self.finish is not None
        timings = replace(
            self.timings,
            first_token_s=self.first_s,
            decode_s=self.last_s - self.first_s,
            answer_tokens=len(self.ids),
        )
        text = "".join(self.pieces) + self.text.finish()
        return Answer(text, tuple(self.ids), timings, self.finish, tuple(self.logprobs))


class Batched:
    """Answers of one Session's model, at most `sequences.n` at once. The Session's own KV cache is not touched."""

    def __init__(self, session: Session, sequences: Sequences, call: Call, devices: tuple[str, str]) -> None:
        self._session, self._sequences, self._options = session, sequences, call.options
        self._devices, self._should_stop = devices, call.should_stop
        self._held: dict[int, list[PromptItem]] = {n: [] for n in range(sequences.n)}
        self._running: dict[int, _Answering] = {}
        self._remembered: OrderedDict[bytes, Answer] = OrderedDict()
        self._error: Exception | None = None
        self._everything = np.arange(session.text.n_vocab, dtype=np.int32)

    def answers(self, jobs: Iterator[Job]) -> Iterator[tuple[int, Answer | PocketLlavaError]]:
        """Each conversation's number and answer, or what is wrong with it, as they are done. Raises BackendError.

        Once it is to stop, the answers that are running end there, "cancelled", and no other is begun.
        """
        job = self._next(jobs)
        while job is not None or self._running:
            while job is not None and self._n_awaited < self._sequences.n:
                if (result := self._begin(*job)) is not None:
                    yield job[0], result
                job = self._next(jobs)
            if self._stopped:
                job = None
                self._cancel()
            yield from self._finished()
            if self._running:
                with translated("decoding"):
                    self._step()
                yield from self._finished()
        if self._error is not None:
            raise self._error

    def _next(self, jobs: Iterator[Job]) -> Job | None:
        """The next conversation; what their iterator raises waits until the answers that are running are whole."""
        try:
            return None if self._stopped else next(jobs, None)
        except Exception as error:
            self._error = error
            return None

    @property
    def _n_awaited(self) -> int:
        """Answers that are running, equal ones counted as often as they were asked for."""
        return sum(len(answering.numbers) for answering in self._running.values())

    @property
    def _stopped(self) -> bool:
        return self._should_stop is not None and self._should_stop()

    def _cancel(self) -> None:
        for answering in self._running.values():
            answering.finish = answering.finish or "cancelled"

    def _begin(
        self, number: int, messages: Sequence[Message] | PocketLlavaError
    ) -> Answer | PocketLlavaError | None:
        """Take up a conversation. Returns an answer that is there already, or what is wrong."""
        if isinstance(messages, PocketLlavaError):
            return messages
        start = time.perf_counter()
        try:
            with translated("evaluating the prompt"):
                return self._taken_up(number, messages, start)
        except InputError as error:
            return error.with_traceback(None)
        except Interrupted:
            return Answer("", (), Timings(devices=self._devices), "cancelled")

    def _taken_up(self, number: int, messages: Sequence[Message], start: float) -> Answer | None:
        """Give the first idle sequence a conversation, unless an equal one is answered, or was."""
        session, options = self._session, self._options
        messages, begun = begun_by(messages, options)
        room = room_for(options, session.text.n_ctx)
        composed = session.compose(messages, room, options.image_tokens or session.image_tokens)
        if self._repeatable:
            for answering in self._running.values():
                if answering.composed.prompt == composed.prompt:
                    answering.numbers.append(number)
                    return None
            if (answer := self._remembered.get(_digest(composed.prompt))) is not None:
                return answer
        sequence = min(self._held.keys() - self._running.keys())
        self._running[sequence] = self._prefilled(sequence, number, composed, begun, start)
        return None

    @property
    def _repeatable(self) -> bool:
        """Whether equal prompts have equal answers."""
        return self._options.temperature == 0 or self._options.seed is not None

    def _finished(self) -> Iterator[tuple[int, Answer]]:
        for sequence, answering in list(self._running.items()):
            if answering.finish is not None:
                del self._running[sequence]
                answer = answering.answer()
                if answering.finish != "cancelled":
                    self._remember(answering.composed.prompt, answer)
                for number in answering.numbers:
                    yield number, answer

    def _remember(self, prompt: Sequence[PromptItem], answer: Answer) -> None:
        if self._repeatable and self._options.top_logprobs is None:  # which would take megabytes
            self._remembered[_digest(prompt)] = answer
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)

    def _prefilled(
        self, sequence: int, number: int, composed: Composed, begun: bool, start: float
    ) -> _Answering:
        """Evaluate a conversation and sample its answer's first token. Raises Interrupted."""
        session, options = self._session, self._options
        composed_s = time.perf_counter() - start
        held, self._held[sequence] = self._held[sequence], []
        n_kept = min(shared(held, composed.prompt), len(composed.prompt) - 1)
        rest = composed.prompt[n_kept:]
        keys = {item.key for item in rest if isinstance(item, ImageSpan)}
        features = {key: session.encoded(composed.images[key], self._should_stop) for key in keys}
        encoded_s = time.perf_counter() - start
        first = n_positions(composed.prompt[:n_kept])
        self._sequences.truncate(sequence, first)
        parts = [features[part.key] if isinstance(part, ImageSpan) else part for part in runs(rest)]
        logits = self._sequences.prefill(sequence, first, parts, self._should_stop)
        self._held[sequence] = composed.prompt
        n_prompt = n_positions(composed.prompt)
        seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
        answering = _Answering(
            [number], composed, session.text.sampler(seed=seed, **settings(options)),
            min(options.max_tokens, self._sequences.n_ctx - n_prompt, session.text.n_ctx - n_prompt),
            AnswerText(options.stop, begun),
            Timings(
                devices=self._devices, preprocess_s=composed_s, encode_s=encoded_s - composed_s,
                prompt_s=time.perf_counter() - start - encoded_s, prompt_tokens=n_prompt,
                image_tokens=n_positions([item for item in composed.prompt if isinstance(item, ImageSpan)]),
                all_image_tokens=composed.all_image_tokens, cached_tokens=first, left_out=composed.left_out,
            ),
            start,
        )  # fmt: skip
        self._sample(answering, logits)
        return answering

    def _step(self) -> None:
        """One token of every answer that goes on."""
        going = list(self._running.items())
        rows = self._sequences.step([(n, answering.position, answering.next_id) for n, answering in going])
        for (_, answering), logits in zip(going, rows, strict=True):
            self._sample(answering, logits)

    def _sample(self, answering: _Answering, logits: Logits) -> None:
        """Choose the next token, and see whether it ends the answer (as engine/local.py does)."""
        vocabulary, n_top = self._session.text.vocabulary, self._options.top_logprobs
        token = answering.sampler.choose(logits, self._everything)
        answering.last_s = time.perf_counter() - answering.start
        answering.first_s = answering.first_s or answering.last_s
        if vocabulary.is_end(token):
            answering.finish = "stop"
            return
        answering.next_id = token
        answering.ids.append(token)
        answering.pieces.append(answering.text.add(vocabulary.piece(token)))
        if n_top is not None:
            answering.logprobs.append(token_logprob(logits, token, n_top, vocabulary))
        if answering.text.stopped:
            answering.finish = "stop"
        elif len(answering.ids) == answering.limit:
            answering.finish = "length"


def _digest(prompt: Sequence[PromptItem]) -> bytes:
    """What tells a prompt, images included, from others."""
    return hashlib.sha256(repr(list(prompt)).encode()).digest()

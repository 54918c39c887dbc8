"""Many conversations, answered several at once: each in a sequence of its own, all decoded in one batch a token.

Knows prompts, Sequences and when an answer ends; not where the conversations come from. A weight that is read once
serves every answer, so decoding speeds up; pictures are still encoded and evaluated one after another. What a sequence
holds of the next prompt's beginning stays, such as a system message.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from pocketllava.engine.answer_text import AnswerText
from pocketllava.engine.generation import settings
from pocketllava.engine.local import begun_by, room_for
from pocketllava.engine.logprobs import token_logprob
from pocketllava.engine.session import Composed, Session
from pocketllava.errors import InputError, PocketLlavaError
from pocketllava.llamacpp.guard import translated
from pocketllava.llamacpp.sampling import Sampler
from pocketllava.llamacpp.sequences import Sequences
from pocketllava.prompt.items import ImageSpan, PromptItem, n_positions, runs, shared
from pocketllava.types import Answer, FinishReason, Message, Options, Timings, TokenLogprob

Job = tuple[int, Sequence[Message] | PocketLlavaError]  # a number, and a conversation, or why there is none
Logits = npt.NDArray[np.float32]


@dataclass
class _Answering:
    """An answer that is being decoded, and what it took so far."""

    number: int
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

    def __init__(
        self, session: Session, sequences: Sequences, options: Options, devices: tuple[str, str]
    ) -> None:
        self._session, self._sequences, self._options = session, sequences, options
        self._devices = devices
        self._held: dict[int, list[PromptItem]] = {n: [] for n in range(sequences.n)}
        self._running: dict[int, _Answering] = {}
        self._error: Exception | None = None
        self._everything = np.arange(session.text.n_vocab, dtype=np.int32)

    def answers(self, jobs: Iterator[Job]) -> Iterator[tuple[int, Answer | PocketLlavaError]]:
        """Each conversation's number and answer, or what is wrong with it, as they are done. Raises BackendError."""
        job = self._next(jobs)
        while job is not None or self._running:
            while job is not None and len(self._running) < self._sequences.n:
                if (error := self._begin(*job)) is not None:
                    yield job[0], error
                job = self._next(jobs)
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
            return next(jobs, None)
        except Exception as error:
            self._error = error
            return None

    def _begin(self, number: int, messages: Sequence[Message] | PocketLlavaError) -> PocketLlavaError | None:
        """Give the first idle sequence a conversation: neighbors are evaluated together. Returns what is wrong."""
        if isinstance(messages, PocketLlavaError):
            return messages
        sequence = min(self._held.keys() - self._running.keys())
        try:
            with translated("evaluating the prompt"):
                self._running[sequence] = self._prefilled(sequence, number, messages)
        except InputError as error:
            return error.with_traceback(None)
        return None

    def _finished(self) -> Iterator[tuple[int, Answer]]:
        for sequence, answering in list(self._running.items()):
            if answering.finish is not None:
                del self._running[sequence]
                yield answering.number, answering.answer()

    def _prefilled(self, sequence: int, number: int, messages: Sequence[Message]) -> _Answering:
        """Evaluate a conversation and sample its answer's first token."""
        session, options, start = self._session, self._options, time.perf_counter()
        messages, begun = begun_by(messages, options)
        room = room_for(options, session.text.n_ctx)
        composed = session.compose(messages, room, options.image_tokens or session.image_tokens)
        composed_s = time.perf_counter() - start
        held, self._held[sequence] = self._held[sequence], []
        n_kept = min(shared(held, composed.prompt), len(composed.prompt) - 1)
        rest = composed.prompt[n_kept:]
        keys = {item.key for item in rest if isinstance(item, ImageSpan)}
        features = {key: session.encoded(composed.images[key]) for key in keys}
        encoded_s = time.perf_counter() - start
        first = n_positions(composed.prompt[:n_kept])
        self._sequences.truncate(sequence, first)
        parts = [features[part.key] if isinstance(part, ImageSpan) else part for part in runs(rest)]
        logits = self._sequences.prefill(sequence, first, parts)
        self._held[sequence] = composed.prompt
        n_prompt = n_positions(composed.prompt)
        seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
        answering = _Answering(
            number, composed, session.text.sampler(seed=seed, **settings(options)),
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

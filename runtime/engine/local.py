"""LocalEngine: a Session in this process, asked in whole answers. Messages in, chunks of text out.

Knows how tokens become text and when an answer ends; not whose turn it is, nor what asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from pocketllava.engine.answer_text import AnswerText
from pocketllava.errors import EngineDied, PocketLlavaError
from pocketllava.types import (
    Answer,
    Beginning,
    Chunk,
    FinishReason,
    ImageSource,
    Message,
    OnProgress,
    Options,
    Timings,
    Trace,
)

if TYPE_CHECKING:
    from PIL import Image

    from pocketllava.engine.batched import Job
    from pocketllava.engine.loading import Loaded
    from pocketllava.engine.session import Prefilled, Session
    from pocketllava.engine.structured import Constraint
    from pocketllava.llamacpp.guard import ShouldStop
    from pocketllava.llamacpp.sequences import Sequences
    from pocketllava.vision.feature_cache import Features

ROOM = 4  # the part of the context that Options.truncate makes free for an answer


@dataclass(frozen=True)
class Call:
    """What one answer is asked with."""

    options: Options
    should_stop: ShouldStop | None = None
    on_progress: OnProgress | None = None


class Engine(Protocol):
    """What Llava stands on: one loaded model, in this process or in a child. One caller at a time.

    Every method raises what Llava's method of that name raises.
    """

    @property
    def devices(self) -> tuple[str, str]:
        """Names of what evaluates the text model, and the vision tower."""

    @property
    def n_ctx(self) -> int:
        """Tokens of context."""

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""

    def answer(self, messages: Sequence[Message], call: Call) -> Generator[Chunk, None, None]:
        """An answer's chunks, to be closed; seconds count from its beginning, the queue's are 0."""

    def prefill(self, messages: Sequence[Message], call: Call) -> None:
        """Evaluate a conversation up to its last image. Raises Interrupted once call.should_stop() is true."""

    def image_features(self, image: ImageSource, image_tokens: int | None) -> Features:
        """(n_tokens, n_embd) float32."""

    def count_tokens(self, messages: Sequence[Message], image_tokens: int | None) -> int:
        """Positions that a conversation takes."""

    def clear(self) -> None:
        """Evaluate the next prompt from its beginning."""

    def trace(self, messages: Sequence[Message], image_tokens: int | None) -> Trace:
        """Follow one picture through the model."""

    def view(self, image: ImageSource, image_tokens: int | None) -> Image.Image:
        """The picture as the model sees it."""

    def digest(self, image: ImageSource) -> str | None:
        """What tells an image's content from any other's; may be called while another call runs."""

    def fingerprint(self, image: ImageSource) -> str:
        """What tells a picture's pixels from others'; may be called while another call runs."""

    def unload(self) -> None:
        """Free the model; the next call loads it again."""

    def close(self) -> None:
        """Free the model for good."""


def begun_by(messages: Sequence[Message], options: Options) -> tuple[Sequence[Message], bool]:
    """The conversation with the beginning of its answer, and whether there is one."""
    begun = bool((options.prefill or "").strip())
    return ([*messages, Beginning(options.prefill or "")] if begun else messages), begun


def room_for(options: Options, n_ctx: int) -> int | None:
    """What Options.truncate makes free for an answer; None without it."""
    return min(options.max_tokens, n_ctx // ROOM) if options.truncate else None


class LocalEngine:
    """An Engine in this process. A session whose device failed is freed, and the next call loads another."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        """load: gives a session, owned from now on. Raises what it raises."""
        self._load = load
        self._held, self._failed = load(), False

    @property
    def session(self) -> Session:
        """For the call whose turn it is. Raises what loading raises."""
        if self._failed:
            self._held, self._failed = self._load(), False
        return self._held.session

    @contextmanager
    def used(self) -> Iterator[Session]:
        """The session, for a call that may find its device failed."""
        try:
            yield self.session
        except EngineDied:
            self._failed = True
            with suppress(Exception):
                self._held.session.close()
            raise

    @property
    def loaded(self) -> bool:
        return not self._failed

    @property
    def devices(self) -> tuple[str, str]:
        return self._held.device, self._held.session.vision.device

    @property
    def n_ctx(self) -> int:
        return self._held.session.text.n_ctx

    def answer(self, messages: Sequence[Message], call: Call) -> Generator[Chunk, None, None]:
        with self.used(), closing(self._answer(messages, call)) as chunks:
            yield from chunks

    def _answer(self, messages: Sequence[Message], call: Call) -> Generator[Chunk, None, None]:
        from pocketllava.engine.session import PrefillInterrupted

        options = call.options
        messages, begun = begun_by(messages, options)
        room = room_for(options, self.n_ctx)
        constraint, start = self.session.constraint(options), time.perf_counter()
        try:
            prefilled = self.session.prefill(
                messages,
                should_stop=call.should_stop,
                truncate_for=room,
                image_tokens=options.image_tokens,
                on_progress=call.on_progress,
            )
        except PrefillInterrupted as interrupted:
            yield Chunk("", (), "cancelled", self._timings(interrupted.prefilled))
            return
        if options.choices is not None:
            yield from self._choice(prefilled, call, start)
        else:
            yield from self._sampled(prefilled, call, start, constraint, begun)

    def _choice(self, prefilled: Prefilled, call: Call, start: float) -> Generator[Chunk, None, None]:
        """The likeliest of the choices."""
        from pocketllava.llamacpp.guard import Interrupted

        try:
            scored = self.session.choose(call.options.choices or (), call.should_stop)
        except Interrupted:
            yield Chunk("", (), "cancelled", self._timings(prefilled))
            return
        at_s = time.perf_counter() - start
        yield Chunk(scored.choices[0].text, scored.token_ids)
        timings = self._timings(prefilled, at_s, at_s, len(scored.token_ids))
        yield Chunk("", (), "stop", timings, choices=scored.choices)

    def _sampled(
        self, prefilled: Prefilled, call: Call, start: float, constraint: Constraint | None, begun: bool
    ) -> Generator[Chunk, None, None]:
        """A sampled answer. JSON ends by itself: texts in `stop` could only break it."""
        text = AnswerText(call.options.stop if constraint is None else (), begun)
        vocabulary = self.session.text.vocabulary
        limit = min(call.options.max_tokens, self.n_ctx - prefilled.prompt_tokens)
        finish: FinishReason = "length"
        first_s = last_s = 0.0
        n = 0
        with closing(self.session.generate(prefilled, call.options, limit, constraint)) as tokens:
            for token in tokens:
                last_s = time.perf_counter() - start
                first_s = first_s or last_s
                if call.should_stop is not None and call.should_stop():
                    finish = "cancelled"
                    break
                if vocabulary.is_end(token.id):
                    finish = "stop"
                    break
                n += 1
                logprobs = (token.logprob,) if token.logprob else ()
                yield Chunk(text.add(vocabulary.piece(token.id)), (token.id,), logprobs=logprobs)
                if text.stopped:
                    finish = "stop"
                    break
                if n == limit:
                    break
        if constraint is not None and constraint.complete:
            finish = "stop"
        yield Chunk(text.finish(), (), finish, self._timings(prefilled, first_s, last_s, n))

    def answer_many(
        self, jobs: Iterator[Job], call: Call, n: int, n_ctx: int
    ) -> Generator[tuple[int, Answer | PocketLlavaError], None, None]:
        """Conversations, answered n at once with n_ctx positions each, as they are done; to be closed.

        Rather fewer than none where there is no memory for n. Raises BackendError.
        """
        from pocketllava.engine.batched import Batched

        with self.used() as session, self._sequences(n, min(n_ctx, self.n_ctx)) as sequences:
            yield from Batched(session, sequences, call, self.devices).answers(jobs)

    def _sequences(self, n: int, n_ctx: int) -> Sequences:
        from pocketllava.errors import BackendError
        from pocketllava.llamacpp.sequences import Sequences

        try:
            return Sequences(self.session.text, n, n_ctx)
        except BackendError:
            if n == 1:
                raise
        return self._sequences(n // 2, n_ctx)

    def read_ahead(self, image: ImageSource) -> None:
        """Preprocess an image while another call runs; whoever asks about it is told what is wrong with it."""
        with suppress(Exception):
            self._held.session.images.process(image)

    def prefill(self, messages: Sequence[Message], call: Call) -> None:
        with self.used() as session:
            session.prefill(
                messages,
                should_stop=call.should_stop,
                to_sample=False,
                image_tokens=call.options.image_tokens,
                on_progress=call.on_progress,
            )

    def image_features(self, image: ImageSource, image_tokens: int | None) -> Features:
        with self.used() as session:
            return session.image_features(image, image_tokens=image_tokens)

    def count_tokens(self, messages: Sequence[Message], image_tokens: int | None) -> int:
        return self.session.count_tokens(messages, image_tokens=image_tokens)

    def clear(self) -> None:
        self.session.clear()

    def trace(self, messages: Sequence[Message], image_tokens: int | None) -> Trace:
        from pocketllava.engine.trace import trace

        with self.used() as session:
            return trace(session, messages, image_tokens=image_tokens)

    def view(self, image: ImageSource, image_tokens: int | None) -> Image.Image:
        with self.used() as session:
            return session.view(image, image_tokens=image_tokens)

    def digest(self, image: ImageSource) -> str | None:
        return self._held.session.images.digest(image)

    def fingerprint(self, image: ImageSource) -> str:
        return self._held.session.images.process(image).key

    def unload(self) -> None:
        from pocketllava.errors import UnsupportedOption

        raise UnsupportedOption("unload: only a model that was loaded with isolated=True can be loaded again")

    def close(self) -> None:
        if not self._failed:
            self._held.session.close()

    def _timings(
        self, prefilled: Prefilled, first_s: float = 0.0, last_s: float = 0.0, n_tokens: int = 0
    ) -> Timings:
        return replace(
            Timings(devices=self.devices),
            preprocess_s=prefilled.preprocess_s,
            encode_s=prefilled.encode_s,
            prompt_s=prefilled.prompt_s,
            first_token_s=first_s,
            decode_s=last_s - first_s,
            prompt_tokens=prefilled.prompt_tokens,
            image_tokens=prefilled.image_tokens,
            all_image_tokens=prefilled.all_image_tokens,
            cached_tokens=prefilled.cached_tokens,
            answer_tokens=n_tokens,
            left_out=prefilled.left_out,
        )

"""Llava: a loaded bundle that answers questions about images; the door to the package.

The one generator core is `stream`; ask and chat join it, astream, aask and achat run it in a thread. Knows how tokens
become text, when an answer ends, and whose call comes first; prompt, image and cache work is the Session's.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pocketllava.engine.answer_text import AnswerText
from pocketllava.engine.lock import Lease, ModelLock
from pocketllava.engine.preparation import Preparation
from pocketllava.errors import InputError
from pocketllava.models import Bundle
from pocketllava.prompt.openai import as_messages
from pocketllava.settings import Setting, checked, settings
from pocketllava.types import (
    Answer,
    Chunk,
    FinishReason,
    ImageSource,
    Message,
    Messages,
    Options,
    Timings,
    Trace,
    as_images,
    conversation,
    load_options,
    sampling,
)

if TYPE_CHECKING:
    from PIL import Image

    from pocketllava.engine.session import Prefilled, Session
    from pocketllava.engine.structured import Constraint
    from pocketllava.vision.feature_cache import Features

ROOM = 4  # the part of the context that Options.truncate makes free for an answer
IMAGE_TOKENS = settings(Options)["image_tokens"]
QUEUE_TIMEOUT = Setting("number", "How long a call waits for those before it.", (), low=0, optional=True)


@dataclass(frozen=True)
class _Call:
    """What one answer was asked with."""

    options: Options
    should_stop: Callable[[], bool] | None
    queue_timeout_s: float | None
    start: float


class Llava:
    """A loaded model.

    Use it as a context manager, or call close(). Threads may share it: one call runs at a time, the others wait. Every
    call raises StateError after close(), and in a child of fork(), which has to load its own.

    Example:
        >>> with Llava.load("demo") as model:
        ...     model.ask("scene.png", "What is at the center?").text
        'a blue square'
    """

    def __init__(self, bundle: Bundle, session: Session, load_s: float, device: str) -> None:
        """Programs call Llava.load."""
        self.bundle, self.load_s = bundle, load_s
        self._session, self._device = session, device
        self._lock = ModelLock()
        self._preparation: Preparation | None = None

    @classmethod
    def load(cls, path: str | PathLike[str], **load: Any) -> Llava:
        """Load a bundle.

        Args:
            path: A folder made by `pocketllava convert`, or "demo", the model in the package.
            **load: Fields of LoadOptions: n_ctx, n_threads, n_gpu_layers, max_pixels, kv_type, weights, cache_dir,
                cache_bytes, keep_prefixes.

        Returns:
            The loaded model.

        Raises:
            ModelNotFound: There is no such bundle; names the nearest, or the command that makes it.
            BundleError: A file of the bundle is missing or damaged.
            UnsupportedOption: An option that does not exist, or that this build of llama.cpp cannot honor.
            BackendError: llama.cpp cannot load it.

        Example:
            >>> Llava.load("demo", n_ctx=512).n_ctx
            512
        """
        from pocketllava.engine.loading import load_bundle
        from pocketllava.names import open_bundle

        start = time.perf_counter()
        options = load_options(**load)
        bundle = open_bundle(path)
        loaded = load_bundle(bundle, options)
        return cls(bundle, loaded.session, time.perf_counter() - start, loaded.device)

    def ask(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        question: str,
        *,
        system: str | None = None,
        options: Options | None = None,
        queue_timeout_s: float | None = None,
        **changes: Any,
    ) -> Answer:
        """Ask one question about an image, several in their order, or none.

        Args:
            image: A path, bytes, an open binary file, a data URI, a PIL image or an array; a list or tuple of them;
                or None.
            question: The question.
            system: A system message before it.
            options: How the answer is sampled.
            queue_timeout_s: Wait no longer than this for calls of other threads; None waits for ever.
            **changes: Fields of Options, which replace those of `options`: max_tokens=64, temperature=0.7.

        Returns:
            The answer; its str is its text.

        Raises:
            InputError: An argument that cannot be used; ImageError for an image, ContextOverflow if all of it does not
                fit.
            StateError: The model is closed, or still busy after queue_timeout_s.
            BackendError: llama.cpp failed.

        Example:
            >>> llava.ask("scene.png", "How many objects are there?", max_tokens=8).text
            '4'
        """
        return self.chat(
            conversation(image, question, system), options=options, queue_timeout_s=queue_timeout_s, **changes
        )

    def chat(
        self,
        messages: Messages,
        *,
        options: Options | None = None,
        queue_timeout_s: float | None = None,
        **changes: Any,
    ) -> Answer:
        """Answer a conversation.

        Args:
            messages: Message objects or OpenAI's dicts, the last of them the user's.
            options: How the answer is sampled.
            queue_timeout_s: Wait no longer than this for calls of other threads; None waits for ever.
            **changes: Fields of Options, which replace those of `options`.

        Returns:
            The answer.

        Raises:
            InputError, StateError, BackendError: As ask() does.

        Example:
            >>> turns = [Message("user", "What is at the center?", "scene.png")]
            >>> turns += [Message("assistant", llava.chat(turns).text), Message("user", "How many objects are there?")]
            >>> llava.chat(turns).text
            '4'
        """
        return _joined(self.stream(messages, options=options, queue_timeout_s=queue_timeout_s, **changes))

    def stream(
        self,
        messages: Messages,
        *,
        options: Options | None = None,
        should_stop: Callable[[], bool] | None = None,
        queue_timeout_s: float | None = None,
        **changes: Any,
    ) -> Iterator[Chunk]:
        """Answer piece by piece.

        The model is taken when the first chunk is asked for, and given back when the iterator ends or is closed.

        Args:
            messages: Message objects or OpenAI's dicts, the last of them the user's.
            options: How the answer is sampled.
            should_stop: Is asked before every token, while the call waits for others, and during prompt evaluation
                (on CPUs at every step of it). Once it is true the answer ends there, "cancelled".
            queue_timeout_s: Wait no longer than this for calls of other threads; None waits for ever.
            **changes: Fields of Options, which replace those of `options`.

        Returns:
            Chunks; the last one carries finish_reason and timings.

        Raises:
            InputError, StateError, BackendError: As ask() does. Arguments are checked by the call itself, images and
                the prompt's length when the first chunk is asked for.

        Example:
            >>> chunks = list(llava.stream([Message(text="Describe the image.", images="scene.png")], max_tokens=8))
            >>> chunks[-1].finish_reason
            'length'
        """
        self._lock.check()
        if should_stop is not None and not callable(should_stop):
            raise InputError(f"should_stop: found {should_stop!r}, expected a function, or None")
        timeout_s = checked("queue_timeout_s", QUEUE_TIMEOUT, queue_timeout_s)
        call = _Call(sampling(options, **changes), should_stop, timeout_s, time.perf_counter())
        return self._stream(as_messages(messages), call)

    def astream(
        self,
        messages: Messages,
        *,
        options: Options | None = None,
        queue_timeout_s: float | None = None,
        **changes: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """stream() for `async for`: the event loop stays free; aclose() or cancelling the task ends the answer.

        Args:
            messages: Message objects or OpenAI's dicts, the last of them the user's.
            options: How the answer is sampled.
            queue_timeout_s: Wait no longer than this for calls of other threads; None waits for ever.
            **changes: Fields of Options, which replace those of `options`.

        Returns:
            Chunks; the last one carries finish_reason and timings.

        Raises:
            InputError, StateError, BackendError: As stream() does.

        Example:
            >>> turns = [Message(text="Describe the image.", images="scene.png")]
            >>> async def last() -> str | None:
            ...     async for chunk in llava.astream(turns, max_tokens=8):
            ...         reason = chunk.finish_reason
            ...     return reason
            >>> asyncio.run(last())
            'length'
        """
        from pocketllava.engine.background import in_background_async

        self._lock.check()
        return in_background_async(
            self.stream,
            as_messages(messages),
            options=sampling(options, **changes),
            queue_timeout_s=checked("queue_timeout_s", QUEUE_TIMEOUT, queue_timeout_s),
        )

    async def aask(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        question: str,
        *,
        system: str | None = None,
        options: Options | None = None,
        queue_timeout_s: float | None = None,
        **changes: Any,
    ) -> Answer:
        """ask() for `await`: the event loop stays free; cancelling the task ends the answer."""
        return await self.achat(
            conversation(image, question, system), options=options, queue_timeout_s=queue_timeout_s, **changes
        )

    async def achat(
        self,
        messages: Messages,
        *,
        options: Options | None = None,
        queue_timeout_s: float | None = None,
        **changes: Any,
    ) -> Answer:
        """chat() for `await`: the event loop stays free; cancelling the task ends the answer."""
        chunks = self.astream(messages, options=options, queue_timeout_s=queue_timeout_s, **changes)
        return _joined([chunk async for chunk in chunks])

    def prefill(
        self,
        image: ImageSource | Sequence[ImageSource],
        *,
        after: Messages = (),
        image_tokens: int | None = None,
    ) -> Preparation:
        """Encode an image and evaluate the prompt up to it in the background, before its question is known.

        A question about the image then waits only for the rest. A question about other images, or another call of
        prefill, cancels the work.

        Args:
            image: One image, or several.
            after: The conversation before them.
            image_tokens: As in Options; give a question the same.

        Returns:
            The running work. Its wait() raises the image's errors.

        Raises:
            InputError: Messages or images of a wrong type.
            StateError: The model is closed.

        Example:
            >>> llava.prefill("scene.png").wait()
            True
        """
        self._lock.check()
        messages = [*as_messages(after), Message("user", "", as_images(image))]
        most = _checked_tokens(image_tokens)
        self._make_way(messages)

        def work(should_stop: Callable[[], bool]) -> None:
            with self._lock.lease(should_stop):
                self._session.prefill(messages, should_stop=should_stop, to_sample=False, image_tokens=most)

        self._preparation = Preparation(work, self._digests(messages))
        return self._preparation

    prepare = prefill  # its name in 0.1

    def image_features(self, image: ImageSource, *, image_tokens: int | None = None) -> Features:
        """The features that the text model gets for an image, equal to the reference's.

        Args:
            image: One image.
            image_tokens: As in Options.

        Returns:
            (n_tokens, n_embd) float32.

        Raises:
            ImageError: The image cannot be used.
            StateError: The model is closed.
            BackendError: llama.cpp failed.

        Example:
            >>> llava.image_features("scene.png").shape
            (36, 256)
        """
        images = as_images(image)
        if len(images) != 1:
            raise InputError(f"image: found {len(images)} images, expected one")
        with self.session() as session:
            return session.image_features(images[0], image_tokens=_checked_tokens(image_tokens))

    def count_tokens(self, messages: Messages, *, image_tokens: int | None = None) -> int:
        """The positions of the context that a conversation takes, images included; no image is decoded.

        Args:
            messages: Message objects or OpenAI's dicts.
            image_tokens: As in Options.

        Returns:
            Tokens of the prompt; an answer needs at least one more.

        Example:
            >>> llava.count_tokens([Message(text="What is it?", images="not opened.png")])
            48
        """
        messages = as_messages(messages)
        with self.session() as session:
            return session.count_tokens(messages, image_tokens=_checked_tokens(image_tokens))

    def clear_cache(self) -> None:
        """Evaluate the next prompt from its beginning. Encoded images, and what a cache folder holds, stay."""
        with self.session() as session:
            session.clear()

    def trace(self, image: ImageSource, question: str, *, image_tokens: int | None = None) -> Trace:
        """Follow one picture through the model, from a real evaluation of the prompt. image_tokens: as in Options."""
        from pocketllava.engine.trace import trace

        messages, most = conversation(image, question), _checked_tokens(image_tokens)
        with self.session() as session:
            return trace(session, messages, image_tokens=most)

    def view(self, image: ImageSource, *, image_tokens: int | None = None) -> Image.Image:
        """The picture as the model sees it: tiles and patches, those that image_tokens leaves out dimmed.

        Args:
            image: One image.
            image_tokens: As in Options.

        Returns:
            An RGB picture, twice the size of the tower's.

        Raises:
            ImageError: The image cannot be used.

        Example:
            >>> llava.view("scene.png", image_tokens=12).size
            (672, 672)
        """
        most = _checked_tokens(image_tokens)
        with self.session() as session:
            return session.view(image, image_tokens=most)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """The engine, for one caller at a time: what measures a model looks at it here. Raises StateError."""
        with self._lock.lease():
            yield self._session

    @property
    def devices(self) -> tuple[str, str]:
        """Names of what evaluates the text model, and the vision tower. Raises StateError."""
        self._lock.check()
        return self._device, self._session.vision.device

    @property
    def n_ctx(self) -> int:
        """Tokens of context: a prompt and its answer. Raises StateError."""
        self._lock.check()
        return self._session.text.n_ctx

    def close(self) -> None:
        """Free the model, after the answer that is running. A second call, or a child of fork(), does nothing."""
        self._make_way(None)
        if self._lock.close():
            self._session.close()

    def __enter__(self) -> Llava:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_way(self, messages: Sequence[Message] | None) -> None:
        """Cancel a preparation that is no help to a conversation."""
        running = self._preparation
        if running is None or running.done:
            return
        if messages is None or not running.helps(self._digests(messages)):
            running.cancel()

    def _digests(self, messages: Sequence[Message]) -> list[str | None]:
        """What tells the content of each image from any other's."""
        images = [image for message in messages for image in message.images]
        return [self._session.images.digest(image) for image in images]

    def _stream(self, messages: list[Message], call: _Call) -> Iterator[Chunk]:
        from pocketllava.engine.session import PrefillInterrupted
        from pocketllava.llamacpp.guard import Interrupted

        self._make_way(messages)
        try:
            lease = self._lock.acquire(call.queue_timeout_s, call.should_stop)
        except Interrupted:
            yield Chunk("", (), "cancelled", self._timings(None, time.perf_counter() - call.start))
            return
        queue_s = time.perf_counter() - call.start
        try:
            room = min(call.options.max_tokens, self.n_ctx // ROOM) if call.options.truncate else None
            constraint = self._session.constraint(call.options)
            prefilled = self._session.prefill(
                messages,
                should_stop=call.should_stop,
                truncate_for=room,
                image_tokens=call.options.image_tokens,
            )
            if call.options.choices is not None:
                yield from self._choice(prefilled, call, queue_s)
            else:
                yield from self._answer(lease, prefilled, call, queue_s, constraint)
        except PrefillInterrupted as interrupted:
            yield Chunk("", (), "cancelled", self._timings(interrupted.prefilled, queue_s))
        finally:
            self._lock.release(lease)

    def _choice(self, prefilled: Prefilled, call: _Call, queue_s: float) -> Iterator[Chunk]:
        """The likeliest of the choices."""
        from pocketllava.llamacpp.guard import Interrupted

        try:
            scored = self._session.choose(call.options.choices or (), call.should_stop)
        except Interrupted:
            yield Chunk("", (), "cancelled", self._timings(prefilled, queue_s))
            return
        at_s = time.perf_counter() - call.start
        yield Chunk(scored.choices[0].text, scored.token_ids)
        timings = self._timings(prefilled, queue_s, at_s, at_s, len(scored.token_ids))
        yield Chunk("", (), "stop", timings, choices=scored.choices)

    def _answer(
        self, lease: Lease, prefilled: Prefilled, call: _Call, queue_s: float, constraint: Constraint | None
    ) -> Iterator[Chunk]:
        """A sampled answer. JSON ends by itself: texts in `stop` could only break it."""
        text = AnswerText(call.options.stop if constraint is None else ())
        vocabulary = self._session.text.vocabulary
        limit = min(call.options.max_tokens, self.n_ctx - prefilled.prompt_tokens)
        finish: FinishReason = "length"
        first_s = last_s = 0.0
        n = 0
        with closing(self._session.generate(prefilled, call.options, limit, constraint)) as tokens:
            for token in tokens:
                last_s = time.perf_counter() - call.start
                first_s = first_s or last_s
                if call.should_stop is not None and call.should_stop():
                    finish = "cancelled"
                    break
                if vocabulary.is_end(token.id):
                    finish = "stop"
                    break
                n += 1
                logprobs = (token.logprob,) if token.logprob else ()
                piece = text.add(vocabulary.piece(token.id))
                if text.stopped:
                    yield Chunk(piece, (token.id,), logprobs=logprobs)
                    finish = "stop"
                    break
                with self._lock.suspended(lease):
                    yield Chunk(piece, (token.id,), logprobs=logprobs)
                if n == limit:
                    break
        if constraint is not None and constraint.complete:
            finish = "stop"
        yield Chunk(text.finish(), (), finish, self._timings(prefilled, queue_s, first_s, last_s, n))

    def _timings(
        self,
        prefilled: Prefilled | None,
        queue_s: float,
        first_s: float = 0.0,
        last_s: float = 0.0,
        n_tokens: int = 0,
    ) -> Timings:
        """prefilled: None for a call that ended before its turn."""
        timings = Timings(load_s=self.load_s, queue_s=queue_s, devices=self.devices)
        if prefilled is None:
            return timings
        return replace(
            timings,
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


def _checked_tokens(image_tokens: object) -> int | None:
    """Raises InputError."""
    most: int | None = checked("image_tokens", IMAGE_TOKENS, image_tokens)
    return most


def _joined(chunks: Iterable[Chunk]) -> Answer:
    """A stream's chunks as one answer."""
    chunks = list(chunks)
    last = chunks[-1]
    assert last.timings is not None  # stream's promise
    assert last.finish_reason is not None
    ids = tuple(i for chunk in chunks for i in chunk.token_ids)
    logprobs = tuple(logprob for chunk in chunks for logprob in chunk.logprobs)
    text = "".join(chunk.text for chunk in chunks)
    return Answer(text, ids, last.timings, last.finish_reason, logprobs, last.choices)

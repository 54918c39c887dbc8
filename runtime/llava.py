"""Llava: a bundle, loaded; ask, chat, stream, astream, prepare, image_features, trace, close.

The one generator core is `stream`; ask and chat join it. Knows how tokens become text and when an answer
ends; prompt, image and cache work is the Session's.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING

from pocketllava.engine.answer_text import AnswerText
from pocketllava.engine.background import in_background_async
from pocketllava.engine.lock import Lease, ModelLock
from pocketllava.engine.preparation import Preparation
from pocketllava.errors import InputError
from pocketllava.models import Bundle
from pocketllava.types import (
    GIGA,
    Answer,
    Chunk,
    FinishReason,
    ImageSource,
    LoadOptions,
    Message,
    Options,
    Timings,
    Trace,
    as_images,
    conversation,
)

if TYPE_CHECKING:
    from pocketllava.engine.session import Prefilled, Session
    from pocketllava.vision.feature_cache import Features

ROOM = 4  # the part of the context that Options.truncate makes free for an answer


class Llava:
    """A loaded model. Use as a context manager, or call close(). Threads may share it: calls queue."""

    def __init__(self, bundle: Bundle, session: Session, load_s: float, device: str) -> None:
        """Programs call Llava.load."""
        self.bundle, self.load_s = bundle, load_s
        self._session, self._device = session, device
        self._lock = ModelLock()
        self._preparation: Preparation | None = None

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        max_pixels: int | None = None,
        kv_type: str = "f16",
        weights: str = "auto",
        cache_dir: str | PathLike[str] | None = None,
        cache_bytes: int = 4 * GIGA,
        keep_prefixes: bool = False,
    ) -> Llava:
        """Load a bundle: a folder made by `pocketllava convert`, or "demo", the model in the package.

        n_ctx: tokens of context (an image takes 576), 2048 unless given. n_threads: CPU threads, the
        number of physical cores unless given. n_gpu_layers: text layers on the GPU, -1 for all that fit,
        0 for none (and the vision tower on the CPU). max_pixels: refuse larger images, 50 megapixels
        unless given. kv_type: "f16", or "q8_0" for half the memory. weights: "memory" reads them, "mapped"
        maps the file, "auto" does what suits the device and the free memory. cache_dir: a folder to keep
        encoded images in, at most cache_bytes; with keep_prefixes evaluated images too (0.3 GB each at 7B).
        Raises ModelNotFound, BundleError, UnsupportedOption, BackendError.
        """
        from pocketllava.engine.loading import load_bundle
        from pocketllava.names import open_bundle

        start = time.perf_counter()
        options = LoadOptions(
            n_ctx,
            n_threads,
            n_gpu_layers,
            max_pixels,
            kv_type,
            weights,
            cache_dir,
            cache_bytes,
            keep_prefixes,
        )
        bundle = open_bundle(path)
        loaded = load_bundle(bundle, options)
        return cls(bundle, loaded.session, time.perf_counter() - start, loaded.device)

    def ask(
        self,
        image: ImageSource | Sequence[ImageSource] | None,
        question: str,
        *,
        options: Options | None = None,
        system: str | None = None,
    ) -> Answer:
        """Ask one question about an image (or several, in order, or none)."""
        return self.chat(conversation(image, question, system), options=options)

    def chat(self, messages: Sequence[Message], *, options: Options | None = None) -> Answer:
        """Answer a whole conversation, whose last message is the user's."""
        chunks = list(self.stream(messages, options=options))
        last = chunks[-1]
        assert last.timings is not None  # stream's promise
        assert last.finish_reason is not None
        ids = tuple(i for chunk in chunks for i in chunk.token_ids)
        return Answer("".join(chunk.text for chunk in chunks), ids, last.timings, last.finish_reason)

    def stream(
        self,
        messages: Sequence[Message],
        *,
        options: Options | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[Chunk]:
        """Answer piece by piece; the last chunk carries finish_reason and timings.

        The model is taken when the first chunk is asked for and given back when the iterator ends or is
        closed. should_stop is asked before every token and during prompt evaluation (on CPUs at every step of it);
        once it is true the answer ends there, "cancelled". Raises InputError and its kinds, BackendError.
        """
        return self._stream(_checked(messages), options or Options(), should_stop)

    def astream(
        self, messages: Sequence[Message], *, options: Options | None = None
    ) -> AsyncGenerator[Chunk, None]:
        """The same for `async for`: the event loop stays free; aclose() or cancelling ends the answer."""
        return in_background_async(self.stream, _checked(messages), options=options)

    def prepare(
        self, image: ImageSource | Sequence[ImageSource], *, after: Sequence[Message] = ()
    ) -> Preparation:
        """Encode an image and evaluate the prompt up to it in the background, before its question is known.

        after: the conversation so far. A question about the image then waits only for itself; one about
        other images, or another preparation, cancels what is still going on. What is wrong with the image is
        raised by the preparation's wait().
        """
        messages = [*_checked(after), Message("user", "", as_images(image))]
        self._make_way(messages)

        def work(should_stop: Callable[[], bool]) -> None:
            with self._lock.lease():
                self._session.prefill(messages, should_stop=should_stop, to_sample=False)

        self._preparation = Preparation(work, self._digests(messages))
        return self._preparation

    def image_features(self, image: ImageSource) -> Features:
        """What the text model sees of an image: (n_tokens, n_embd) float32, equal to the reference's."""
        with self.session() as session:
            return session.image_features(image)

    def count_tokens(self, messages: Sequence[Message]) -> int:
        """Positions of the context that a conversation takes, images included; none of them is opened."""
        with self.session() as session:
            return session.count_tokens(_checked(messages))

    def clear_cache(self) -> None:
        """Evaluate the next prompt from its beginning. Encoded images, and what a cache folder holds, stay."""
        with self.session() as session:
            session.clear()

    def trace(self, image: ImageSource, question: str) -> Trace:
        """Follow one picture through the model, from a real evaluation of the prompt."""
        from pocketllava.engine.trace import trace

        with self.session() as session:
            return trace(session, conversation(image, question))

    @contextmanager
    def session(self) -> Iterator[Session]:
        """The engine, for one caller at a time: what measures a model looks at it here. Raises StateError."""
        with self._lock.lease():
            yield self._session

    @property
    def devices(self) -> tuple[str, str]:
        """What evaluates the text model, and the vision tower."""
        return self._device, self._session.vision.device

    @property
    def n_ctx(self) -> int:
        """Tokens of context: a prompt and its answer."""
        return self._session.text.n_ctx

    def close(self) -> None:
        """Free the model, after the answer that is running. Calling it again does nothing."""
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

    def _stream(
        self, messages: list[Message], options: Options, should_stop: Callable[[], bool] | None
    ) -> Iterator[Chunk]:
        from pocketllava.llamacpp.guard import Interrupted

        start = time.perf_counter()
        self._make_way(messages)
        lease = self._lock.acquire()
        try:
            room = min(options.max_tokens, self.n_ctx // ROOM) if options.truncate else None
            prefilled = self._session.prefill(messages, should_stop=should_stop, truncate_for=room)
            yield from self._answer(lease, prefilled, options, start, should_stop)
        except Interrupted:
            yield Chunk("", (), "cancelled", Timings(load_s=self.load_s))
        finally:
            self._lock.release(lease)

    def _answer(
        self,
        lease: Lease,
        prefilled: Prefilled,
        options: Options,
        start: float,
        should_stop: Callable[[], bool] | None,
    ) -> Iterator[Chunk]:
        text, vocabulary = AnswerText(options.stop), self._session.text.vocabulary
        room = self.n_ctx - len(prefilled.token_ids)
        limit = min(options.max_tokens, room)
        finish: FinishReason = "length"
        first_s = last_s = n = 0.0
        for token in self._session.generate(prefilled, options):
            last_s = time.perf_counter() - start
            first_s = first_s or last_s
            if should_stop is not None and should_stop():
                finish = "cancelled"
                break
            if vocabulary.is_end(token):
                finish = "stop"
                break
            n += 1
            piece = text.add(vocabulary.piece(token))
            if text.stopped:
                yield Chunk(piece, (token,))
                finish = "stop"
                break
            with self._lock.suspended(lease):
                yield Chunk(piece, (token,))
            if n == limit:
                break
        timings = self._timings(prefilled, first_s, last_s, int(n))
        yield Chunk(text.finish(), (), finish, timings)

    def _timings(self, prefilled: Prefilled, first_s: float, last_s: float, n: int) -> Timings:
        return Timings(
            load_s=self.load_s,
            prepare_s=prefilled.prepare_s,
            encode_s=prefilled.encode_s,
            prompt_s=prefilled.prompt_s,
            first_token_s=first_s,
            decode_s=last_s - first_s,
            prompt_tokens=len(prefilled.token_ids),
            image_tokens=prefilled.image_tokens,
            kept_tokens=prefilled.cached_tokens,
            answer_tokens=n,
            devices=self.devices,
            left_out=prefilled.left_out,
        )


def _checked(messages: Sequence[Message]) -> list[Message]:
    messages = list(messages)
    if not all(isinstance(m, Message) for m in messages):
        raise InputError("conversation: expected pocketllava.Message objects")
    return messages

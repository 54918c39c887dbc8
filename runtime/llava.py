"""Llava: a loaded bundle that answers questions about images; the door to the package.

The one generator core is `stream`; ask and chat join it, astream, aask and achat run it in a thread. Checks arguments
and knows whose call comes first; answers are the work of an Engine, in this process or in a child.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from pocketllava.engine.local import Call, Engine, LocalEngine
from pocketllava.engine.lock import ModelLock, Turns
from pocketllava.engine.many import MAX_AT_ONCE, Question, answers_at_once, in_order, one_by_one, read_ahead
from pocketllava.engine.preparation import Preparation
from pocketllava.errors import InputError, PocketLlavaError, UnsupportedOption
from pocketllava.models import Bundle
from pocketllava.prompt.openai import as_messages
from pocketllava.settings import Setting, checked, settings
from pocketllava.types import (
    PAIR,
    Answer,
    Chunk,
    ImageSource,
    Message,
    Messages,
    OnProgress,
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

    from pocketllava.engine.session import Session
    from pocketllava.models.plan import Plan
    from pocketllava.types import LoadOptions
    from pocketllava.vision.feature_cache import Features

IMAGE_TOKENS = settings(Options)["image_tokens"]
BATCH = Setting("whole", "Answers that are decoded at once.", (), low=1, high=MAX_AT_ONCE)
QUEUE_TIMEOUT = Setting("number", "How long a call waits for those before it.", (), low=0, optional=True)


class Llava:
    """A loaded model.

    Use it as a context manager, or call close(). Threads may share it: one call runs at a time, the others wait. Every
    call raises StateError after close(), and in a child of fork(), which has to load its own.

    Example:
        >>> with Llava.load("demo") as model:
        ...     model.ask("scene.png", "What is at the center?").text
        'a blue square'
    """

    def __init__(self, bundle: Bundle, engine: Engine, load_s: float) -> None:
        """Programs call Llava.load."""
        self.bundle, self.load_s = bundle, load_s
        self._engine = engine
        self._lock = ModelLock()
        self._preparation: Preparation | None = None
        self._use = ExitStack()  # of the store's model

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        isolated: bool = False,
        worker_command: Sequence[str] | None = None,
        **load: Any,
    ) -> Llava:
        """Load a bundle.

        Args:
            path: A folder made by `pocketllava convert`, a name of the store, a GGUF text model whose mmproj lies
                beside it, or "demo", the model in the package.
            isolated: Load it in a child process. Should llama.cpp end that process, the call that was running raises
                EngineDied, and the next one loads the model again. This process never loads llama.cpp.
            worker_command: With isolated, what starts a worker in a frozen application, such as [python, "-I",
                "-m", "pocketllava.engine.child"].
            **load: Fields of LoadOptions: n_ctx, n_threads, n_gpu_layers, max_pixels, kv_type, weights, kept_bytes,
                cache_dir, cache_bytes, keep_prefixes; mmproj, template and pad of a GGUF text model.

        Returns:
            The loaded model.

        Raises:
            ModelNotFound: There is no such bundle; names the nearest, or the command that makes it.
            BundleError: A file of the bundle is missing or damaged.
            UnsupportedOption: An option that does not exist, or that this build of llama.cpp cannot honor.
            OutOfMemory: It does not fit the memory; its plan says what is taken and what would fit.
            BackendError: llama.cpp cannot load it.

        Example:
            >>> Llava.load("demo", n_ctx=512).n_ctx
            512
        """
        from pocketllava.names import lease, open_bundle

        start = time.perf_counter()
        options = load_options(**load)
        with ExitStack() as use:
            bundle = open_bundle(path, **_pair(options))
            use.enter_context(lease(bundle))
            engine = _engine(bundle, options, isolated, worker_command)
            llava = cls(bundle, engine, time.perf_counter() - start)
            llava._use = use.pop_all()
        return llava

    @classmethod
    def plan(cls, path: str | PathLike[str], **load: Any) -> Plan:
        """What load() with the same arguments would take on this machine, without loading anything.

        Args:
            path: As in load.
            **load: Fields of LoadOptions.

        Returns:
            The plan: parts, rooms, verdict ("fits", "slow" or "too large") and what would take less. Sizes are in
            bytes; str(plan) is the text of `pocketllava plan`.

        Raises:
            ModelNotFound, BundleError, UnsupportedOption: As load() does.

        Example:
            >>> Llava.plan("demo", n_ctx=512).verdict
            'fits'
        """
        from pocketllava.engine.loading import planned
        from pocketllava.names import open_bundle

        options = load_options(**load)
        return planned(open_bundle(path, **_pair(options)), options)

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

    def ask_many(
        self,
        images: Iterable[ImageSource],
        question: str,
        *,
        system: str | None = None,
        batch: int | Literal["auto"] = "auto",
        options: Options | None = None,
        should_stop: Callable[[], bool] | None = None,
        queue_timeout_s: float | None = None,
        **changes: Any,
    ) -> Iterator[Answer | PocketLlavaError]:
        """Ask one question about each of many images; several answers are decoded at once.

        The next images are read while the model evaluates. An image that cannot be asked about gives its error in its
        place. Equal images are answered once where they are near each other and answers are not drawn anew
        (temperature 0, or a seed). Other calls may go in between; close the iterator to end it sooner.

        Args:
            images: One image each, as ask() takes them; may be an iterator without end.
            question: The question.
            system: A system message before it.
            batch: How many answers to decode at once, at most. 1 gives ask()'s answers bit for bit; with more, sums
                are rounded otherwise, which may decide a near tie. "auto" takes what the device and the free memory
                are good for. With a schema, choices or isolated=True it is always 1.
            options: How answers are sampled; a seed is each answer's own.
            should_stop: Is asked as stream() does. Once it is true the answers that are running end there,
                "cancelled", and nothing comes after them.
            queue_timeout_s: Wait no longer than this, each time, for calls of other threads; None waits for ever.
            **changes: Fields of Options, which replace those of `options`.

        Returns:
            An answer for each image, in their order, or the error. Timings of an answer include its waits for others.

        Raises:
            InputError: An argument that cannot be used.
            StateError: The model is closed, or still busy after queue_timeout_s.
            BackendError: llama.cpp failed; of an isolated model that is an error in the image's place (EngineDied).
            Whatever the iterator of the images raises, after the answers to those before.

        Example:
            >>> [str(answer) for answer in llava.ask_many(["scene.png", "scene.png"], "How many objects are there?")]
            ['4', '4']
        """
        self._lock.check()
        _check_functions(should_stop=should_stop)
        timeout_s = checked("queue_timeout_s", QUEUE_TIMEOUT, queue_timeout_s)
        at_once = None if batch == "auto" else int(checked("batch", BATCH, batch))
        chosen, asked = sampling(options, **changes), Question(question, system)
        if chosen.schema is not None or chosen.choices is not None:
            at_once = 1
        return self._ask_many(images, asked, at_once, Call(chosen, should_stop), timeout_s)

    def stream(
        self,
        messages: Messages,
        *,
        options: Options | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_progress: OnProgress | None = None,
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
            on_progress: Is told of images that are encoded and of positions that are evaluated (Progress).
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
        _check_functions(should_stop=should_stop, on_progress=on_progress)
        timeout_s = checked("queue_timeout_s", QUEUE_TIMEOUT, queue_timeout_s)
        call = Call(sampling(options, **changes), should_stop, on_progress)
        return self._stream(as_messages(messages), call, timeout_s, time.perf_counter())

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
        options = Options(image_tokens=_checked_tokens(image_tokens))
        self._make_way(messages)

        def work(should_stop: Callable[[], bool], on_progress: OnProgress) -> None:
            with self._lock.lease(should_stop):
                self._engine.prefill(messages, Call(options, should_stop, on_progress))

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
        with self._lock.lease():
            return self._engine.image_features(images[0], _checked_tokens(image_tokens))

    def fingerprint(self, image: ImageSource) -> str:
        """What tells a picture from others by its pixels, as the model sees them: equal ones get equal answers.

        The image is decoded and remembered for the question that follows; a thread of its own may do that while the
        model answers.

        Args:
            image: One image.

        Returns:
            64 hexadecimal digits, which depend on the vision tower.

        Raises:
            ImageError: The image cannot be used.
            StateError: The model is closed.

        Example:
            >>> len(llava.fingerprint("scene.png"))
            64
        """
        images = as_images(image)
        if len(images) != 1:
            raise InputError(f"image: found {len(images)} images, expected one")
        self._lock.check()
        return self._engine.fingerprint(images[0])

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
        with self._lock.lease():
            return self._engine.count_tokens(messages, _checked_tokens(image_tokens))

    def clear_cache(self) -> None:
        """Evaluate the next prompt from its beginning. Encoded images, and what a cache folder holds, stay."""
        with self._lock.lease():
            self._engine.clear()

    def trace(self, image: ImageSource, question: str, *, image_tokens: int | None = None) -> Trace:
        """Follow one picture through the model, from a real evaluation of the prompt. image_tokens: as in Options."""
        messages, most = conversation(image, question), _checked_tokens(image_tokens)
        with self._lock.lease():
            return self._engine.trace(messages, most)

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
        with self._lock.lease():
            return self._engine.view(image, most)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """The engine, for one caller at a time: what measures a model looks at it here.

        Raises StateError, UnsupportedOption for a model that was loaded with isolated=True.
        """
        with self._lock.lease():
            if not isinstance(self._engine, LocalEngine):
                raise UnsupportedOption("session: the model was loaded with isolated=True; load it without")
            with self._engine.used() as session:
                yield session

    def unload(self) -> None:
        """Free the memory of a model that was loaded with isolated=True; the next call loads it again.

        Raises StateError, UnsupportedOption for a model in this process.
        """
        with self._lock.lease():
            self._engine.unload()

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory: not after unload(), nor after its process died."""
        self._lock.check()
        return self._engine.loaded

    @property
    def devices(self) -> tuple[str, str]:
        """Names of what evaluates the text model, and the vision tower. Raises StateError."""
        self._lock.check()
        return self._engine.devices

    @property
    def n_ctx(self) -> int:
        """Tokens of context: a prompt and its answer. Raises StateError."""
        self._lock.check()
        return self._engine.n_ctx

    def close(self) -> None:
        """Free the model, after the answer that is running. A second call, or a child of fork(), does nothing."""
        self._make_way(None)
        if self._lock.close():
            with self._use:
                self._engine.close()

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
        return [self._engine.digest(image) for image in images]

    def _ask_many(
        self,
        images: Iterable[ImageSource],
        asked: Question,
        at_once: int | None,
        call: Call,
        timeout_s: float | None,
    ) -> Iterator[Answer | PocketLlavaError]:
        """at_once: None for what suits the device."""
        from pocketllava.llamacpp.guard import Interrupted

        engine = self._engine
        with suppress(Interrupted):  # while it waited for other calls
            if isinstance(engine, LocalEngine) and at_once != 1:
                n_ctx = self._positions(engine, asked, call, timeout_s)
                if at_once is None:
                    at_once = answers_at_once(self.bundle, min(n_ctx, self.n_ctx))
                if isinstance(images, Sized):
                    at_once = max(1, min(at_once, len(images)))
                if at_once != 1:
                    yield from self._ask_together(engine, images, asked, at_once, n_ctx, call, timeout_s)
                    return
            read = engine.read_ahead if isinstance(engine, LocalEngine) else _nothing
            with closing(read_ahead(images, read)) as ahead:
                yield from one_by_one(
                    lambda image: _joined(
                        self._stream(asked.about(image), call, timeout_s, time.perf_counter())
                    ),
                    ahead,
                    call.should_stop,
                )

    def _positions(self, engine: LocalEngine, asked: Question, call: Call, timeout_s: float | None) -> int:
        """At most, that an image's prompt and its answer take."""
        with self._lock.lease(call.should_stop, timeout_s):
            n, shown = engine.count_tokens(asked.about(None), None), engine.session.image_tokens
        image = min(self.bundle.image_tokens, call.options.image_tokens or shown or self.bundle.image_tokens)
        begun = (call.options.prefill or "").encode("utf-8", "replace")
        return n + image + call.options.max_tokens + len(begun)

    def _ask_together(
        self,
        engine: LocalEngine,
        images: Iterable[ImageSource],
        asked: Question,
        n: int,
        n_ctx: int,
        call: Call,
        timeout_s: float | None,
    ) -> Iterator[Answer | PocketLlavaError]:
        """The results in their order. Other calls may go in between: the answers' KV cache is their own."""
        self._make_way(None)
        with (
            self._lock.turns(timeout_s, call.should_stop) as turns,
            closing(read_ahead(_between(images, turns), engine.read_ahead)) as ahead,
            closing(engine.answer_many(asked.jobs(ahead), call, n, n_ctx)) as numbered,
        ):
            for result in in_order(numbered):
                if isinstance(result, Answer):
                    result = replace(result, timings=self._timings(result.timings, 0.0))
                with turns.between():
                    yield result

    def _stream(
        self, messages: list[Message], call: Call, timeout_s: float | None, start: float
    ) -> Iterator[Chunk]:
        """The engine's chunks while this call has the model, their times counted from the call."""
        from pocketllava.llamacpp.guard import Interrupted

        self._make_way(messages)
        try:
            lease = self._lock.acquire(timeout_s, call.should_stop)
        except Interrupted:
            queue_s = time.perf_counter() - start
            yield Chunk("", (), "cancelled", Timings(self.load_s, queue_s, devices=self.devices))
            return
        queue_s = time.perf_counter() - start
        try:
            with closing(self._engine.answer(messages, call)) as chunks:
                for chunk in chunks:
                    if chunk.timings is not None:
                        yield replace(chunk, timings=self._timings(chunk.timings, queue_s))
                        continue
                    with self._lock.suspended(lease):
                        yield chunk
        finally:
            self._lock.release(lease)

    def _timings(self, timings: Timings, queue_s: float) -> Timings:
        """The engine's, which knows of no queue."""
        first_s = timings.first_token_s + queue_s if timings.first_token_s else 0.0
        return replace(timings, load_s=self.load_s, queue_s=queue_s, first_token_s=first_s)


def _engine(
    bundle: Bundle, options: LoadOptions, isolated: bool, worker_command: Sequence[str] | None
) -> Engine:
    """The loaded model, in this process or in a child."""
    if isolated:
        from pocketllava.engine.process import ProcessEngine

        return ProcessEngine(bundle, options, worker_command)
    from pocketllava.engine.loading import load_bundle

    return LocalEngine(lambda: load_bundle(bundle, options))


def _pair(options: LoadOptions) -> dict[str, Any]:
    """What is said of a text model without bundle.json."""
    return {name: getattr(options, name) for name in PAIR}


def _between(images: Iterable[ImageSource], turns: Turns) -> Iterator[ImageSource]:
    """The images; their iterator is the caller's code, which may use the model."""
    following = iter(images)
    while True:
        with turns.between():
            try:
                image = next(following)
            except StopIteration:
                return
        yield image


def _check_functions(**functions: object) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise InputError(f"{name}: found {function!r}, expected a function, or None")


def _nothing(_image: ImageSource) -> None:
    """An isolated model reads images itself."""


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

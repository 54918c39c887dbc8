"""Llava: a bundle, loaded; ask, chat, stream, image_features, trace, close.

The one generator core is `stream`; ask and chat join it. Knows how tokens become text and when an answer
ends; prompt, image and cache work is the handler's.
"""

from __future__ import annotations

import codecs
import random
import time
from collections.abc import Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pocketllava.errors import InputError, UnsupportedOption
from pocketllava.models import Bundle
from pocketllava.turns import Turn, Turns
from pocketllava.types import Answer, Chunk, FinishReason, ImageSource, Message, Options, Timings, Trace

if TYPE_CHECKING:
    from pocketllava.handler import Evaluated, LlavaChatHandler
    from pocketllava.vision import Features

DEFAULT_CONTEXT = 2048  # an image (576), a conversation, and an answer of 512 tokens; less if trained on less
CONTEXT_STEP = 256  # llama.cpp pads the context to it; llama_cpp's buffers must agree
PIECE_BYTES = 1024


class Llava:
    """A loaded model. Use as a context manager, or call close(). Threads may share it: calls queue."""

    def __init__(
        self, bundle: Bundle, llama: Any, handler: LlavaChatHandler, load_s: float, device: str
    ) -> None:
        self.bundle, self._llama, self._handler = bundle, llama, handler
        self._load_s, self._device = load_s, device
        self._turns = Turns()

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        max_pixels: int | None = None,
    ) -> Llava:
        """Load a bundle: a folder made by `pocketllava convert`, or "demo", the model in the package.

        n_ctx: tokens of context (an image takes 576), 2048 unless given. n_threads: CPU threads, the
        number of physical cores unless given. n_gpu_layers: text layers on the GPU, -1 for all that fit,
        0 for none (and the vision tower on the CPU). max_pixels: refuse larger images, 50 megapixels
        unless given.
        Raises ModelNotFound, BundleError, UnsupportedOption, BackendError.
        """
        from pocketllava.loading import load_bundle
        from pocketllava.names import open_bundle

        start = time.perf_counter()
        bundle = open_bundle(path)
        llama, handler, device = load_bundle(bundle, n_ctx, n_threads, n_gpu_layers, max_pixels)
        return cls(bundle, llama, handler, time.perf_counter() - start, device)

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

    def stream(self, messages: Sequence[Message], *, options: Options | None = None) -> Iterator[Chunk]:
        """Answer piece by piece; the last chunk carries finish_reason and timings.

        The model is taken when the first chunk is asked for and given back when the iterator ends or is
        closed. Raises InputError and its kinds, BackendError.
        """
        messages = list(messages)
        if not all(isinstance(m, Message) for m in messages):
            raise InputError("conversation: expected pocketllava.Message objects")
        return self._stream(messages, options or Options())

    def image_features(self, image: ImageSource) -> Features:
        """What the text model sees of an image: (n_patches, n_embd) float32, equal to the reference's."""
        with self._turns.turn():
            pixels = self._handler.prepare(self._llama, [image])[0]
            return self._handler.features(self._llama, pixels)

    def trace(self, image: ImageSource, question: str) -> Trace:
        """Follow one picture through the model, from a real evaluation of the prompt."""
        from pocketllava.trace import trace

        with self._turns.turn():
            return trace(self._llama, self._handler, conversation(image, question))

    def close(self) -> None:
        """Free the model, after the answer that is running. Calling it again does nothing."""
        if self._turns.close():
            self._handler.close()
            self._llama.close()

    def __enter__(self) -> Llava:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, messages: list[Message], options: Options) -> Iterator[Chunk]:
        turn = self._turns.begin()
        try:
            start = time.perf_counter()
            evaluated = self._handler.evaluate(self._llama, messages)
            yield from self._answer(turn, evaluated, options, start)
        finally:
            self._turns.end(turn)

    def _answer(self, turn: Turn, evaluated: Evaluated, options: Options, start: float) -> Iterator[Chunk]:
        text = AnswerText(options.stop)
        room = self._llama.n_ctx() - len(evaluated.token_ids)
        limit = min(options.max_tokens, room)
        finish: FinishReason = "length"
        first_s = last_s = n = 0.0
        for token in self._tokens(evaluated.token_ids, options):
            last_s = time.perf_counter() - start
            first_s = first_s or last_s
            if self._is_end(token):
                finish = "stop"
                break
            n += 1
            piece = text.add(self._piece(token))
            if text.stopped:
                yield Chunk(piece, (token,))
                finish = "stop"
                break
            with self._turns.suspended(turn):
                yield Chunk(piece, (token,))
            if n == limit:
                break
        timings = self._timings(evaluated, first_s, last_s, int(n))
        yield Chunk(text.finish(), (), finish, timings)

    def _timings(self, evaluated: Evaluated, first_s: float, last_s: float, n: int) -> Timings:
        vision = self._handler._vision
        return Timings(
            load_s=self._load_s,
            prepare_s=evaluated.prepare_s,
            encode_s=evaluated.encode_s,
            prompt_s=evaluated.prompt_s,
            first_token_s=first_s,
            decode_s=last_s - first_s,
            prompt_tokens=len(evaluated.token_ids),
            image_tokens=evaluated.image_tokens,
            kept_tokens=evaluated.kept_tokens,
            answer_tokens=n,
            devices=(self._device, vision.device if vision else "not used"),
        )

    def _tokens(self, prompt: list[int], options: Options) -> Iterator[int]:
        from pocketllava.backend import translated

        seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
        self._llama.set_seed(seed)
        with translated("generating the answer"):
            yield from self._llama.generate(
                prompt,
                temp=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k,
                min_p=0.0,
                repeat_penalty=1.0,
            )

    def _is_end(self, token: int) -> bool:
        from llama_cpp import llama_cpp

        ends = self.bundle.manifest["eos_token_ids"]  # config.json may name several; a GGUF file holds one
        return token in ends or bool(llama_cpp.llama_vocab_is_eog(self._llama._model.vocab, token))

    def _piece(self, token: int) -> bytes:
        """A token's bytes. llama_cpp's own detokenizer cuts pieces off at 32 bytes."""
        import ctypes

        from llama_cpp import llama_cpp

        buffer = ctypes.create_string_buffer(PIECE_BYTES)
        n = llama_cpp.llama_token_to_piece(self._llama._model.vocab, token, buffer, PIECE_BYTES, 0, False)
        return buffer.raw[: max(0, n)]


class AnswerText:
    """Token bytes -> text, whole characters only, ending before the first stop text.

    A text that may become a stop text is held back until it is clear. The space that SentencePiece puts
    before the first word is dropped, as the reference's decoder does.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self.stopped = stop, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held, self._begun = "", False

    def add(self, piece: bytes) -> str:
        """The text that this token makes certain; "" while it may still be part of a stop text."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """What was held back, at the end of an answer."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if text and not self._begun:
            text, self._begun = text.removeprefix(" "), True
        text = self._held + text
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def conversation(
    image: ImageSource | Sequence[ImageSource] | None, question: str, system: str | None = None
) -> list[Message]:
    """A system message, if any, and one question about the images."""
    images = () if image is None else tuple(image) if isinstance(image, list | tuple) else (image,)
    first = [Message("system", system)] if system else []
    return [*first, Message("user", question, images)]


def context_size(n_ctx: int | None, trained: int) -> int:
    """n_ctx rounded up as llama.cpp needs it. Raises UnsupportedOption outside what the model was trained on."""
    if n_ctx is None:
        n_ctx = min(DEFAULT_CONTEXT, trained)
    if not 1 <= n_ctx <= trained:
        raise UnsupportedOption(
            f"n_ctx: found {n_ctx}, expected 1 to {trained}, the context of the model's training"
        )
    return -(-n_ctx // CONTEXT_STEP) * CONTEXT_STEP


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

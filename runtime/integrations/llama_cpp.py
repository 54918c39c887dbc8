"""LlavaChatHandler: llama-cpp-python's chat handler for LLaVA-1.5 and 1.6 with the right image features and prompt.

An adapter: OpenAI messages in, completion out. One Session for the Llama that it is used with; what happens
between is the engine's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama, LogitsProcessorList
from llama_cpp.llama_chat_format import Llava15ChatHandler

from pocketllava.engine.placing import device_beside
from pocketllava.engine.session import Session
from pocketllava.engine.structured import Constraint
from pocketllava.errors import BundleError, StateError, UnsupportedOption
from pocketllava.llamacpp.devices import devices
from pocketllava.llamacpp.private import private
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.models import Bundle
from pocketllava.models.file_type import type_name
from pocketllava.models.gguf_header import Header
from pocketllava.models.limits import check_room
from pocketllava.models.plan import EXACT
from pocketllava.names import open_bundle
from pocketllava.prompt.openai import as_messages
from pocketllava.types import load_options, sampling

OWN_OPTIONS = ("max_pixels", "kept_bytes", "cache_dir", "cache_bytes", "keep_prefixes", "image_tokens")


class LlavaChatHandler(Llava15ChatHandler):  # type: ignore[misc]
    """Drop-in for llama_cpp's Llava15ChatHandler: `Llama(model, chat_handler=LlavaChatHandler(mmproj))`.

    Example:
        >>> handler = LlavaChatHandler("llava-1.5-7b")
        >>> llama = Llama("llava-1.5-7b/model.gguf", chat_handler=handler, n_ctx=2048)
        >>> llama.create_chat_completion([{"role": "user", "content": "Hello."}])
    """

    DEFAULT_SYSTEM_MESSAGE = None

    def __init__(
        self,
        clip_model_path: str | PathLike[str],
        verbose: bool = False,
        *,
        use_gpu: bool = True,
        **load: Any,
    ) -> None:
        """Find the files; the vision tower itself is loaded with the first call.

        Args:
            clip_model_path: A bundle's folder, its mmproj.gguf, "demo", or an mmproj file that stands alone (then
                the chat template is the text model's own, and images are prepared as llava-1.5 prepares them).
            verbose: As in llama_cpp.
            use_gpu: Whether the vision tower may be on a GPU.
            **load: max_pixels, kept_bytes (1 GiB), cache_dir, cache_bytes, keep_prefixes and image_tokens, as in
                Llava.load; others are the Llama's.

        Raises:
            ModelNotFound, BundleError, UnsupportedOption.
        """
        path = Path(clip_model_path)
        self.bundle = Bundle.beside(path) if path.is_file() else open_bundle(clip_model_path)
        mmproj = self.bundle.mmproj if self.bundle else path
        if not mmproj.is_file():
            raise BundleError(f"{mmproj}: no such file, expected an mmproj or a bundle's folder")
        super().__init__(clip_model_path=str(mmproj), verbose=verbose)
        self.use_gpu = use_gpu
        if others := set(load) - set(OWN_OPTIONS):
            raise UnsupportedOption(
                f"{min(others)}: expected one of {', '.join(OWN_OPTIONS)}; other options are llama_cpp.Llama's own"
            )
        self.options = load_options(**load)
        self._session: Session | None = None
        self._closed = False
        self._llama: weakref.ref[Llama] | None = None

    def __call__(self, *, llama: Llama, messages: Any, **options: Any) -> Any:
        """Answer an OpenAI-style chat request, as Llama.create_chat_completion passes it on.

        Images are data URIs. Raises InputError and its kinds before anything is evaluated, StateError after close().
        """
        schema = _schema(options.pop("response_format", None))
        options = _checked(options)
        top_logprobs = options.pop("top_logprobs", None)
        if options.pop("logprobs", False):
            options["logprobs"] = top_logprobs or 0
        options.setdefault("repeat_penalty", 1.0)
        session = self.session(llama)
        constraint = session.constraint(sampling(schema=schema))
        prefilled = session.prefill(as_messages(messages))
        held = Held(constraint, len(prefilled.token_ids)) if constraint else None
        if held is not None:
            options["logits_processor"] = LogitsProcessorList(
                [*(options.get("logits_processor") or ()), held]
            )
        completion = llama.create_completion(prompt=prefilled.token_ids, **options)
        if held is not None:
            completion = held.checked(completion)
        to_chat = private("llama_cpp.llama_chat_format", "_convert_completion_to_chat")
        return to_chat(completion, stream=options.get("stream", False))

    def session(self, llama: Llama) -> Session:
        """The engine of a Llama, made with the first call. Raises BundleError for an mmproj of another model.

        Another Llama than the last one begins anew: nothing that was computed for that holds for it. The Llama
        is referred to weakly, because it holds this handler and must be free to go. Raises StateError after close(),
        the handler's or the Llama's.
        """
        if self._closed or not llama.model:
            owner = "handler" if self._closed else "Llama"
            raise StateError(f"{owner}: used after close(); make another")
        if self._session is None or self._llama is None or self._llama() is not llama:
            self._free()
            text = TextModel(weakref.proxy(llama))
            mmproj = Path(self.clip_model_path)
            check_room(mmproj, mmproj.stat().st_size)
            self._session = Session(text, mmproj, self.bundle, self.options, **self._placed(mmproj, text))
            self._llama = weakref.ref(llama)
        return self._session

    def _placed(self, mmproj: Path, text: TextModel) -> dict[str, Any]:
        """Where the vision tower goes, and what a Llama of one's own is taken to be on."""
        exact = type_name(text.metadata) in EXACT  # the Llama's own file, which need not be the bundle's
        header = self.bundle.mmproj_header if self.bundle else Header.read(mmproj)
        device = device_beside(header, type_name(header.keys), exact=exact) if self.use_gpu else None
        kinds = repr([d.kind for d in devices()]) if text.on_gpu else ""
        return {"vision_device": device, "exact": exact, "text_kind": kinds}

    def close(self) -> None:
        """Free the vision tower. A second call does nothing, any other raises StateError."""
        self._closed = True
        self._free()

    def _free(self) -> None:
        if self._session is not None:
            self._session.vision.close()
            self._session = None


class Held:
    """Holds llama_cpp's own sampling to a grammar; a logits processor."""

    def __init__(self, constraint: Constraint, n_prompt: int) -> None:
        """n_prompt: positions before the answer."""
        self._constraint, self._n_consumed = constraint, n_prompt
        self._error: Exception | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """scores (n_vocab,), -inf where a token may not follow input_ids (n_positions,)."""
        allowed: Any = slice(None)
        try:
            if self._error is None:
                self._constraint.consume([int(i) for i in input_ids[self._n_consumed :]])
                self._n_consumed = len(input_ids)
                allowed = self._constraint.allowed()
        except Exception as error:  # llama.cpp called: what is raised here would be printed and lost
            self._error = error
        held = np.full_like(scores, -np.inf)
        held[allowed] = scores[allowed]
        return held

    def checked(self, completion: Any) -> Any:
        """A completion, or the chunks of one. Raises UnsupportedSchema if the grammar gave up before its end."""
        if not isinstance(completion, dict):
            return self._checked(completion)
        self._check()
        return completion

    def _checked(self, chunks: Iterator[Any]) -> Iterator[Any]:
        for chunk in chunks:
            self._check()
            yield chunk

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """What llama_cpp may be asked for. Raises UnsupportedOption for tools, and for llama.cpp's own grammars.

    llama.cpp's converter and parser of grammars can end the process.
    """
    for name in ("functions", "function_call", "tools", "tool_choice"):
        if options.pop(name, None):
            raise UnsupportedOption(f"{name}: LLaVA was not trained to call tools; leave it out")
    if options.get("grammar") is not None:
        raise UnsupportedOption(
            "grammar: found a grammar, which can end llama.cpp's process, expected none; use response_format"
        )
    return options


def _schema(wanted: Any) -> Any:
    """The JSON schema of a response_format, OpenAI's or llama_cpp's; None for text. Raises UnsupportedOption."""
    form = wanted if isinstance(wanted, dict) else {"type": wanted}
    kind = form.get("type")
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return form.get("schema") or {"type": "object"}
    described = form.get("json_schema")
    if kind == "json_schema" and isinstance(described, dict) and "schema" in described:
        return described["schema"]
    raise UnsupportedOption(
        f"response_format: found {wanted!r}, expected the type 'text', 'json_object', or 'json_schema' with its schema"
    )

"""LlavaChatHandler: llama-cpp-python's LLaVA-1.5 chat handler with the right image features and prompt.

Joins image.py, prompt.py, vision.py and a llama_cpp.Llama; knows no command line and no streams.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from llama_cpp import Llama, llama_cpp
from llama_cpp.llama_chat_format import (
    Llava15ChatHandler,
    _convert_completion_to_chat,
    _grammar_for_response_format,
)

from pocketllava.backend import cores, translated
from pocketllava.errors import BundleError, ContextOverflow, ImageError, InputError, UnsupportedOption
from pocketllava.features import FeatureCache, key_of
from pocketllava.image import MAX_PIXELS, Pixels, prepare
from pocketllava.kv import KvCache
from pocketllava.models import Bundle
from pocketllava.models.bundle import DEFAULT_TEMPLATE
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.prefix import Entry, ImageSpan, n_positions
from pocketllava.prompt import ImagePlace, Template
from pocketllava.types import Message
from pocketllava.vision import Features, VisionEncoder

IMAGE_TOKEN = "<image>"
CONTROL_ATTRIBUTE = 1 << 3  # llama.h, LLAMA_TOKEN_ATTR_CONTROL


@dataclass(frozen=True)
class Evaluated:
    """A prompt that the KV cache now holds.

    token_ids: one a position, the image token's id at image positions. kept_tokens: positions at the
    start that the cache held already. Seconds are wall time.
    """

    token_ids: list[int]
    image_tokens: int
    kept_tokens: int
    prepare_s: float
    encode_s: float
    prompt_s: float


class LlavaChatHandler(Llava15ChatHandler):  # type: ignore[misc]
    """Drop-in for llama_cpp's Llava15ChatHandler: `Llama(model, chat_handler=LlavaChatHandler(mmproj))`.

    clip_model_path: a bundle's folder, its mmproj.gguf, or an mmproj file that stands alone (then the
    chat template is the text model's own, and images are prepared as llava-1.5 prepares them).
    """

    DEFAULT_SYSTEM_MESSAGE = None

    def __init__(
        self,
        clip_model_path: str | PathLike[str],
        verbose: bool = False,
        *,
        use_gpu: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        """Raises ModelNotFound or BundleError; the vision tower itself is loaded with the first call."""
        path = Path(clip_model_path)
        self.bundle = Bundle.open(path) if path.is_dir() else Bundle.beside(path)
        mmproj = self.bundle.mmproj if self.bundle else path
        if not mmproj.is_file():
            raise BundleError(f"{mmproj}: no such file, expected an mmproj or a bundle's folder")
        super().__init__(clip_model_path=str(mmproj), verbose=verbose)
        self.use_gpu, self.max_pixels = use_gpu, max_pixels
        self.preprocessing = self.bundle.preprocessing if self.bundle else None
        self._vision: VisionEncoder | None = None
        self._template: Template | None = None
        self._features = FeatureCache()
        self._cache = KvCache()
        self._bound: weakref.ref[Llama] | None = None

    def __call__(self, *, llama: Llama, messages: list[dict[str, Any]], **options: Any) -> Any:
        """Answer an OpenAI-style chat request, as Llama.create_chat_completion passes it on.

        Images are data URIs. Raises InputError and its kinds before anything is evaluated.
        """
        for name in ("functions", "function_call", "tools", "tool_choice"):
            if options.pop(name, None):
                raise UnsupportedOption(f"{name}: LLaVA-1.5 was not trained to call tools; leave it out")
        response_format = options.pop("response_format", None)
        if response_format and response_format.get("type") == "json_object":
            options["grammar"] = _grammar_for_response_format(response_format)
        top_logprobs = options.pop("top_logprobs", None)
        if options.pop("logprobs", False):
            options["logprobs"] = top_logprobs or 0
        options.setdefault("repeat_penalty", 1.0)
        evaluated = self.evaluate(llama, [from_openai(message) for message in messages])
        completion = llama.create_completion(prompt=evaluated.token_ids, **options)
        return _convert_completion_to_chat(completion, stream=options.get("stream", False))

    def _bind(self, llama: Llama) -> None:
        """Start anew for another Llama than the last one: nothing that was computed for that holds for it."""
        if self._bound is None or self._bound() is not llama:
            self.close()
            self._template, self._features, self._cache = None, FeatureCache(), KvCache()
            self._bound = weakref.ref(llama)

    def vision(self, llama: Llama) -> VisionEncoder:
        """The vision tower, loaded once. Raises BundleError for one of another model."""
        self._bind(llama)
        if self._vision is None:
            threads = llama.n_threads_batch or cores()
            self._vision = VisionEncoder(
                Path(self.clip_model_path), llama.model, n_threads=threads, use_gpu=self.use_gpu
            )
        return self._vision

    def template(self, llama: Llama) -> Template:
        """The checkpoint's chat template with the text model's special tokens."""
        self._bind(llama)
        if self._template is None:
            bundle = self.bundle
            own = llama.metadata.get("tokenizer.chat_template", "")
            special = special_tokens(llama)
            special.setdefault(IMAGE_TOKEN, max(0, llama.token_eos()))
            texts = {i: text for text, i in special.items()}
            vocab = llama._model.vocab
            self._template = Template(
                source=bundle.template if bundle else own if "image" in own else DEFAULT_TEMPLATE,
                special=special,
                image_token=bundle.manifest["image"]["token"] if bundle else IMAGE_TOKEN,
                bos=texts.get(llama.token_bos(), ""),
                eos=texts.get(llama.token_eos(), ""),
                add_bos=llama_cpp.llama_vocab_get_add_bos(vocab),
                space_prefix=bundle.space_prefix if bundle else "every",
            )
        return self._template

    def prompt_ids(self, llama: Llama, messages: Sequence[Message]) -> list[int | ImagePlace]:
        """Token ids of a conversation, an ImagePlace for each picture."""

        def tokenize(text: str) -> list[int]:
            return list(llama.tokenize(text.encode(), add_bos=False, special=False))

        return self.template(llama).token_ids(messages, tokenize)

    def prepare(self, llama: Llama, images: Sequence[Any]) -> list[Pixels]:
        """Decode, resize and crop pictures. Raises ImageError."""
        side = self.vision(llama).info.image_size
        how = self.preprocessing or Preprocessing(shortest_edge=side, crop_size=side)
        return [prepare(image, how, self.max_pixels) for image in images]

    def features(self, llama: Llama, pixels: Pixels) -> Features:
        """Prepared pixels -> (n_patches, n_embd) float32, encoded unless they are remembered."""
        key = key_of(pixels)
        features = self._features.get(key)
        if features is None:
            features = self.vision(llama).encode(pixels)
            self._features.put(key, features)
        return features

    def evaluate(self, llama: Llama, messages: Sequence[Message]) -> Evaluated:
        """Bring a conversation into the KV cache, ready for sampling; what the cache holds of it stays.

        Raises InputError (ContextOverflow, ImageError) before the cache is touched, BackendError after.
        """
        ids = self.prompt_ids(llama, messages)
        images = [image for message in messages for image in message.images]
        n_patches = self.vision(llama).info.n_patches if images else 0
        needed = len(ids) + len(images) * (n_patches - 1)
        if needed >= llama.n_ctx():
            raise ContextOverflow(needed, llama.n_ctx())
        start = time.perf_counter()
        pixels = self.prepare(llama, images) if images else []
        keys = [key_of(p) for p in pixels]
        prompt: list[Entry] = [i if isinstance(i, int) else ImageSpan(keys[i.index], n_patches) for i in ids]
        prepared = time.perf_counter()
        kept = self._cache.kept(llama, prompt)
        missing = {entry.key for entry in prompt[kept:] if isinstance(entry, ImageSpan)}
        features = {k: self.features(llama, p) for k, p in zip(keys, pixels, strict=True) if k in missing}
        encoded = time.perf_counter()
        template = self.template(llama)
        image_id = template.special[template.image_token]
        with translated("evaluating the prompt"):
            self._cache.fill(llama, prompt, kept, features, image_id)
        return Evaluated(
            token_ids=llama.input_ids[: llama.n_tokens].tolist(),
            image_tokens=len(images) * n_patches,
            kept_tokens=n_positions(prompt[:kept]),
            prepare_s=prepared - start,
            encode_s=encoded - prepared,
            prompt_s=time.perf_counter() - encoded,
        )

    def forget(self) -> None:
        """Evaluate the next prompt from its beginning."""
        self._cache.forget()

    def close(self) -> None:
        """Free the vision tower; the handler may be used again, which loads it anew."""
        if self._vision is not None:
            self._vision.close()
            self._vision = None


def special_tokens(llama: Llama) -> dict[str, int]:
    """Control tokens of a loaded model, by their text."""
    vocab = llama._model.vocab
    return {
        llama_cpp.llama_vocab_get_text(vocab, i).decode("utf-8", "replace"): i
        for i in range(llama.n_vocab())
        if llama_cpp.llama_vocab_get_attr(vocab, i) & CONTROL_ATTRIBUTE
    }


def from_openai(message: dict[str, Any]) -> Message:
    """An OpenAI chat message -> Message. Its images must be data URIs: no file and no address is opened."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return Message(message["role"], content or "")
    texts: list[str] = []
    images: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(part["text"])
        elif kind == "image_url":
            images.append(_data_uri(part["image_url"]))
        else:
            raise InputError(
                f"message content: found a part of type {kind!r}, expected 'text' or 'image_url'"
            )
    return Message(message["role"], " ".join(texts), tuple(images))


def _data_uri(value: Any) -> str:
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or url[:5].lower() != "data:":
        found = str(url)[:40]
        raise ImageError(f"image_url: found {found!r}, expected a data URI (data:image/...;base64,...)")
    return url

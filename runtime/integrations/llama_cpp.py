"""LlavaChatHandler: llama-cpp-python's LLaVA-1.5 chat handler with the right image features and prompt.

Joins image.py, prompt.py, vision.py and a llama_cpp.Llama; knows no command line and no streams.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from llama_cpp import Llama, llama_cpp
from llama_cpp import __version__ as llama_cpp_version
from llama_cpp.llama_chat_format import (
    Llava15ChatHandler,
    _convert_completion_to_chat,
    _grammar_for_response_format,
)

from pocketllava.engine.kv_cache import KvCache
from pocketllava.engine.prefix_cache import Prefixes
from pocketllava.errors import BundleError, ContextOverflow, UnsupportedOption
from pocketllava.llamacpp.backend import Interrupted, cores, translated
from pocketllava.models import Bundle
from pocketllava.models.blob_cache import Store
from pocketllava.models.bundle import DEFAULT_TEMPLATE, file_identity
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.prompt.items import Entry, ImageSpan, image_ends, n_positions
from pocketllava.prompt.openai import from_openai
from pocketllava.prompt.template import ImagePlace, Template
from pocketllava.prompt.truncation import leave_out
from pocketllava.types import GIGA, Message
from pocketllava.vision.encoder import ENCODER_VERSION, VisionEncoder
from pocketllava.vision.feature_cache import FeatureCache, Features, key_of
from pocketllava.vision.image import MAX_PIXELS, Pixels, prepare

IMAGE_TOKEN = "<image>"
CONTROL_ATTRIBUTE = 1 << 3  # llama.h, LLAMA_TOKEN_ATTR_CONTROL


@dataclass(frozen=True)
class Evaluated:
    """A prompt that the KV cache now holds.

    token_ids: one a position, the image token's id at image positions. kept_tokens: positions at the
    start that the cache held already, or that were restored. left_out: messages that did not fit. Seconds
    are wall time.
    """

    token_ids: list[int]
    image_tokens: int
    kept_tokens: int
    prepare_s: float
    encode_s: float
    prompt_s: float
    left_out: int


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
        cache_dir: str | PathLike[str] | None = None,
        cache_bytes: int = 4 * GIGA,
        keep_prefixes: bool = False,
    ) -> None:
        """cache_dir, cache_bytes, keep_prefixes: as in Llava.load.

        Raises ModelNotFound or BundleError; the vision tower itself is loaded with the first call.
        """
        path = Path(clip_model_path)
        self.bundle = Bundle.open(path) if path.is_dir() else Bundle.beside(path)
        mmproj = self.bundle.mmproj if self.bundle else path
        if not mmproj.is_file():
            raise BundleError(f"{mmproj}: no such file, expected an mmproj or a bundle's folder")
        super().__init__(clip_model_path=str(mmproj), verbose=verbose)
        self.use_gpu, self.max_pixels = use_gpu, max_pixels
        self.preprocessing = self.bundle.preprocessing if self.bundle else None
        self._store = Store(Path(cache_dir), cache_bytes) if cache_dir is not None else None
        self._keep_prefixes = keep_prefixes
        self._encoder = f"{self._identity(mmproj)} {ENCODER_VERSION} {llama_cpp_version}"
        self._vision: VisionEncoder | None = None
        self._template: Template | None = None
        self._features = FeatureCache(store=self._store)
        self._cache: KvCache | None = None
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
            self._template, self._cache = None, None
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
            texts = {i: text for text, i in special.items()}
            special.setdefault(IMAGE_TOKEN, max(0, llama.token_eos()))  # no row of its own: any id will do
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

    def cache(self, llama: Llama) -> KvCache:
        """What the Llama's KV cache holds, with the image prefixes that are kept to go back to."""
        self._bind(llama)
        if self._cache is None:
            template, p = self.template(llama), llama.context_params
            settings = (
                *(self._identity(Path(llama.model_path)), self._encoder, llama.model_params.n_gpu_layers),
                *(p.n_batch, p.n_ubatch, p.type_k, p.type_v, p.flash_attn_type),
            )
            store = self._store if self._keep_prefixes else None
            prefixes = Prefixes(store=store, settings=repr(settings))
            self._cache = KvCache(template.special[template.image_token], prefixes)
        return self._cache

    def _identity(self, path: Path) -> str:
        """A file's SHA-256 where the bundle records it, else what tells it from others without reading it."""
        bundle = self.bundle
        if bundle and path in (bundle.model, bundle.mmproj):
            return str(bundle.manifest["files"][path.name]["sha256"])
        return file_identity(path)

    def prepare(self, llama: Llama, images: Sequence[Any]) -> list[Pixels]:
        """Decode, resize and crop pictures. Raises ImageError."""
        side = self.vision(llama).info.image_size
        how = self.preprocessing or Preprocessing(shortest_edge=side, crop_size=side)
        return [prepare(image, how, self.max_pixels) for image in images]

    def features(self, llama: Llama, pixels: Pixels) -> Features:
        """Prepared pixels -> (n_patches, n_embd) float32, encoded unless they are remembered."""
        info, key = self.vision(llama).info, key_of(pixels, self._encoder)
        features = self._features.get(key, (info.n_patches, info.projected_width))
        return (
            features if features is not None else self._features.put(key, self.vision(llama).encode(pixels))
        )

    def evaluate(
        self,
        llama: Llama,
        messages: Sequence[Message],
        *,
        stop: Callable[[], bool] | None = None,
        to_sample: bool = True,
        shift_for: int | None = None,
    ) -> Evaluated:
        """Bring a conversation into the KV cache, ready for sampling; what the cache holds of it stays.

        stop: ends it with Interrupted once it is true. to_sample=False: no further than the last image.
        shift_for: leave out the oldest turns of a conversation that has no room for that many tokens more.
        Raises InputError (ContextOverflow, ImageError) before the cache is touched, BackendError after.
        """
        clock = [time.perf_counter()]
        n_messages = len(messages)
        if shift_for is not None:
            room = llama.n_ctx() - shift_for
            messages = leave_out(
                messages, lambda some: self._length(llama, self.prompt_ids(llama, some)), room
            )
        prompt, pixels = self._prompt(llama, messages, to_sample)
        clock.append(time.perf_counter())
        if stop is not None and stop():
            raise Interrupted
        cache = self.cache(llama)
        with translated("restoring the prompt"):
            kept = cache.keep(llama, prompt, to_sample=to_sample)
        clock.append(time.perf_counter())
        missing = {entry.key for entry in prompt[kept:] if isinstance(entry, ImageSpan)}
        features = {key: self._unless(stop, llama, pixels[key]) for key in missing}
        clock.append(time.perf_counter())
        with translated("evaluating the prompt"):
            cache.fill(llama, prompt, kept, features, stop)
        clock.append(time.perf_counter())
        prepare_s, keep_s, encode_s, fill_s = (b - a for a, b in pairwise(clock))
        return Evaluated(
            token_ids=llama.input_ids[: llama.n_tokens].tolist(),
            image_tokens=n_positions([e for e in prompt if isinstance(e, ImageSpan)]),
            kept_tokens=n_positions(prompt[:kept]),
            prepare_s=prepare_s,
            encode_s=encode_s,
            prompt_s=keep_s + fill_s,
            left_out=n_messages - len(messages),
        )

    def _prompt(
        self, llama: Llama, messages: Sequence[Message], to_sample: bool
    ) -> tuple[list[Entry], dict[str, Pixels]]:
        """A conversation's entries, and its pictures by key. Raises InputError and its kinds."""
        ids = self.prompt_ids(llama, messages)
        if (needed := self._length(llama, ids)) >= llama.n_ctx():
            raise ContextOverflow(needed, llama.n_ctx())
        images = [image for message in messages for image in message.images]
        pixels = self.prepare(llama, images) if images else []
        keys = [key_of(p, self._encoder) for p in pixels]
        n_patches = self.vision(llama).info.n_patches if images else 0
        prompt: list[Entry] = [i if isinstance(i, int) else ImageSpan(keys[i.index], n_patches) for i in ids]
        if not to_sample:
            prompt = prompt[: next(iter(image_ends(prompt)), 0)]
        return prompt, dict(zip(keys, pixels, strict=True))

    def _length(self, llama: Llama, ids: Sequence[int | ImagePlace]) -> int:
        n_images = sum(isinstance(i, ImagePlace) for i in ids)
        return len(ids) + (n_images * (self.vision(llama).info.n_patches - 1) if n_images else 0)

    def _unless(self, stop: Callable[[], bool] | None, llama: Llama, pixels: Pixels) -> Features:
        if stop is not None and stop():
            raise Interrupted
        return self.features(llama, pixels)

    def forget(self) -> None:
        """Evaluate the next prompt from its beginning."""
        self._cache = None

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

"""Session: one loaded model with its caches. Messages in, tokens out.

Joins the rooms below: images become features, messages become a prompt, and the KV cache evaluates what is
new. Knows no command line, no streams and no text of answers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocketllava.engine.choices import Scored, scored
from pocketllava.engine.generation import Token, constrained, free
from pocketllava.engine.kv_cache import KvCache
from pocketllava.engine.local import ROOM
from pocketllava.engine.prefix_cache import MAX_BYTES, PrefixCache
from pocketllava.engine.structured import Constraint, Grammars
from pocketllava.errors import ContextOverflow, InputError
from pocketllava.llamacpp.guard import Interrupted, ShouldStop, translated
from pocketllava.llamacpp.private import library_version
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.models import Bundle
from pocketllava.models.blob_cache import BlobCache
from pocketllava.models.bundle import DEFAULT_TEMPLATE, MMPROJ, MODEL, file_identity
from pocketllava.models.gguf_header import Header
from pocketllava.models.machine import Device
from pocketllava.models.memory import CONTEXT_STEP
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.prompt.items import (
    ImageSpan,
    PromptItem,
    fill,
    fitting_image_tokens,
    last_image_end,
    n_positions,
    placeholders,
)
from pocketllava.prompt.template import Template, Tokenize
from pocketllava.prompt.truncation import without_oldest
from pocketllava.types import ImageSource, LoadOptions, Message, OnProgress, Options, Progress
from pocketllava.vision.decoding import MAX_PIXELS
from pocketllava.vision.encoder import ENCODER_VERSION, VisionEncoder
from pocketllava.vision.feature_cache import FeatureCache, Features, Order
from pocketllava.vision.image_processor import ImageProcessor, PreparedImage
from pocketllava.vision.selection import METHOD, chosen, select
from pocketllava.vision.tiles import pack
from pocketllava.vision.view import draw

if TYPE_CHECKING:
    from PIL import Image

IMAGE_TOKEN = "<image>"
# Other special tokens that a chat template may name, and their keys in the text model's file.
NAMED_TOKENS = {
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}


@dataclass(frozen=True)
class Prefilled:
    """A prompt that the KV cache now holds.

    token_ids: one a position, the image token's id at image positions. cached_tokens: positions at the
    start that the cache held already, or that were restored. all_image_tokens: what the pictures would take if none
    were left out. left_out: messages that did not fit. Seconds
    are wall time.
    """

    token_ids: list[int]
    prompt_tokens: int
    image_tokens: int
    all_image_tokens: int
    cached_tokens: int
    preprocess_s: float
    encode_s: float
    prompt_s: float
    left_out: int


@dataclass(frozen=True)
class Composed:
    """A prompt, and its images by key. left_out: messages that had no room; all_image_tokens: with none left out."""

    prompt: list[PromptItem]
    images: dict[str, PreparedImage]
    left_out: int
    all_image_tokens: int


class PrefillInterrupted(Interrupted):
    """prefill() was asked to stop; `prefilled` counts the work until then and has no token ids."""

    def __init__(self, prefilled: Prefilled) -> None:
        super().__init__()
        self.prefilled = prefilled


class Session:
    """One loaded model: text model, vision tower, template, caches. Not thread-safe; ModelLock guards it."""

    def __init__(
        self,
        text: TextModel,
        mmproj: Path,
        bundle: Bundle | None = None,
        options: LoadOptions | None = None,
        *,
        vision_device: Device | None = None,
        exact: bool = False,
        text_kind: str = "",
    ) -> None:
        """Load the vision tower beside a text model; the session owns both from now on.

        bundle: says how images are prepared and what the template is; without one the template is the text
        model's own, and images are prepared as llava-1.5 prepares them. vision_device: where the tower goes, None for
        the CPU; exact: whether its sums are to be as exact there. text_kind: the kinds of devices that hold the text
        model's layers, "" for the CPU. Raises BundleError for an mmproj of another model, BackendError.
        """
        options = options or LoadOptions()
        self.text, self.bundle, self.is_exact = text, bundle, exact
        header = bundle.mmproj_header if bundle else Header.read(mmproj)
        self.vision = VisionEncoder(
            header,
            text.model,
            n_threads=text.n_threads,
            n_embd=text.n_embd,
            device=vision_device,
            exact=exact,
        )
        side = self.vision.info.image_size
        encoder = f"{self._identity(mmproj, header)} {ENCODER_VERSION} {library_version()}{self.vision.kind}"
        alone = Preprocessing(shortest_edge=side, crop_size=side, tiling=self.vision.info.tiling)
        self.images = ImageProcessor(
            bundle.preprocessing if bundle else alone,
            grid=self.vision.info.grid,
            max_pixels=options.max_pixels or MAX_PIXELS,
            encoder=encoder,
        )
        self.image_tokens = options.image_tokens
        self.template = _template(text, bundle)
        store = (
            BlobCache(Path(options.cache_dir), options.cache_bytes) if options.cache_dir is not None else None
        )
        self._features = FeatureCache(store=store)
        settings = repr((self._identity(text.path, text.header), encoder, *text.settings)) + text_kind
        self.prefixes = PrefixCache(
            MAX_BYTES if options.kept_bytes is None else options.kept_bytes,
            store if options.keep_prefixes else None,
            settings,
        )
        self.cache = KvCache(text, self.image_id, self.prefixes)
        self._grammars: Grammars | None = None

    @property
    def image_id(self) -> int:
        """The token id that stands where an image is."""
        return self.template.special[self.template.image_token]

    def prefill(
        self,
        messages: Sequence[Message],
        *,
        should_stop: ShouldStop | None = None,
        to_sample: bool = True,
        truncate_for: int | None = None,
        image_tokens: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> Prefilled:
        """Bring a conversation into the KV cache, ready for sampling; what the cache holds of it stays.

        should_stop: ends it with PrefillInterrupted once it is true. to_sample=False: no further than the last
        image. truncate_for: leave out the oldest turns of a conversation that has no room for that many tokens more.
        image_tokens: show each picture by that many tokens at most; None: as the session was loaded.
        on_progress: is told of tiles that are encoded and positions that are evaluated.
        Raises InputError (ContextOverflow, ImageError) before the cache is touched, BackendError after.
        """
        work = _Work(on_progress)
        try:
            self._prefill(
                work, messages, should_stop, to_sample, truncate_for, image_tokens or self.image_tokens
            )
        except Interrupted as error:
            raise PrefillInterrupted(work.prefilled([])) from error
        return work.prefilled(self.text.token_ids)

    def _prefill(
        self,
        work: _Work,
        messages: Sequence[Message],
        should_stop: ShouldStop | None,
        to_sample: bool,
        truncate_for: int | None,
        image_tokens: int | None,
    ) -> None:
        """prefill(), noting what is done as it goes."""
        n_messages = len(messages)
        with work.timed("preprocess"):
            messages, work.prompt = self._fitting(messages, truncate_for, image_tokens)
            work.left_out = n_messages - len(messages)
            work.prompt, images = self._prompt(messages, work.prompt, image_tokens, should_stop)
            work.all_image_tokens = _all_tokens(work.prompt, images)
            if not to_sample:
                work.prompt = work.prompt[: last_image_end(work.prompt)]
        with work.timed("prompt"), translated("restoring the prompt"):
            work.n_reused = self.cache.reuse(work.prompt, to_sample=to_sample)
        with work.timed("encode"):
            missing = {item.key for item in work.prompt[work.n_reused :] if isinstance(item, ImageSpan)}
            work.start_tiles(sum(len(images[key].tiles) for key in missing))
            features = {key: self.encoded(images[key], should_stop, work.count_tile) for key in missing}
        with work.timed("prompt"), translated("evaluating the prompt"):
            self.cache.decode(work.prompt, work.n_reused, features, should_stop, work.on_progress)

    def compose(
        self, messages: Sequence[Message], truncate_for: int | None, image_tokens: int | None
    ) -> Composed:
        """A conversation's prompt, its images preprocessed and nothing evaluated. Raises as prefill() does."""
        kept, counted = self._fitting(messages, truncate_for, image_tokens)
        prompt, images = self._prompt(kept, counted, image_tokens, None)
        return Composed(prompt, images, len(messages) - len(kept), _all_tokens(prompt, images))

    def constraint(self, options: Options) -> Constraint | None:
        """The beginning of an answer that fits options.schema, if there is one. Raises InputError."""
        if options.schema is None:
            return None
        self._grammars = self._grammars or Grammars(self.text)
        return self._grammars.constraint(dict(options.schema))

    def generate(
        self, prefilled: Prefilled, options: Options, limit: int, constraint: Constraint | None = None
    ) -> Generator[Token, None, None]:
        """Sample the answer's tokens, one by one; to be closed (TextModel.generate). Raises BackendError.

        Without a constraint they have no end; with one there are at most `limit`, and fewer if the JSON is whole.
        """
        seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
        with translated("generating the answer"):
            if constraint is None:
                yield from free(self.text, prefilled.token_ids, seed, options)
            else:
                yield from constrained(self.text, constraint, seed, options, limit)

    def choose(self, choices: Sequence[str], should_stop: ShouldStop | None = None) -> Scored:
        """Score texts as the answer to the prompt that was prefilled. Raises Interrupted, BackendError."""
        with translated("scoring the choices"), self.cache.prompt_kept():
            return scored(self.text, choices, should_stop)

    def image_features(self, image: ImageSource, *, image_tokens: int | None = None) -> Features:
        """What the text model sees of an image, (n_tokens, n_embd) float32. Raises ImageError, BackendError."""
        return self.encoded(self.images.process(image).with_tokens(image_tokens or self.image_tokens))

    def view(self, image: ImageSource, *, image_tokens: int | None = None) -> Image.Image:
        """The picture as the model sees it, patches that are left out dimmed. Raises ImageError, BackendError."""
        prepared = self.images.process(image).with_tokens(image_tokens or self.image_tokens)
        fewer = prepared.n_tokens < prepared.all_tokens
        kept = chosen(self._ranked(prepared, None)[1], prepared.n_tokens) if fewer else None
        return draw(prepared, self.vision.info.grid, kept)

    def count_tokens(self, messages: Sequence[Message], *, image_tokens: int | None = None) -> int:
        """Positions that a conversation takes; of tiled images the size is read, no image is decoded.

        Raises InputError.
        """
        return n_positions(self._count(messages, image_tokens, self.text.tokenize))

    def count(self, messages: Sequence[Message], *, image_tokens: int | None = None) -> list[PromptItem]:
        """A conversation's prompt, with placeholders for its images. Raises InputError, ContextOverflow."""
        return self._count(messages, image_tokens, self._tokenize_short)

    def _count(
        self, messages: Sequence[Message], image_tokens: int | None, tokenize: Tokenize
    ) -> list[PromptItem]:
        most = image_tokens or self.image_tokens
        counts = (self.images.n_tokens(image, most) for message in messages for image in message.images)
        return self.template.prompt(messages, placeholders(counts), tokenize)

    def _tokenize_short(self, text: str) -> list[int]:
        """A run's ids. Raises ContextOverflow before tokenizing what cannot fit, which can take libllama hours."""
        n_bytes = len(text.strip().encode())
        if n_bytes > self.text.n_ctx:
            least = -(-n_bytes // self.text.vocabulary.longest_bytes)
            if least > self.text.n_ctx:
                raise ContextOverflow(least, self.text.n_ctx, (), self._fitting_context(least))
        return self.text.tokenize(text)

    def clear(self) -> None:
        """Evaluate the next prompt from its beginning; features and what is on disk stay."""
        self.cache.clear()
        self.prefixes.clear()

    def close(self) -> None:
        """Free the vision tower and the text model, whose vocabulary the grammars point to."""
        self._grammars = None
        self.vision.close()
        self.text.close()

    def _fitting(
        self, messages: Sequence[Message], truncate_for: int | None, image_tokens: int | None
    ) -> tuple[Sequence[Message], list[PromptItem]]:
        """A conversation that fits the context, and its prompt as it was counted. Raises InputError."""
        try:
            counted = self.count(messages, image_tokens=image_tokens)
            fits = n_positions(counted) <= self.text.n_ctx - (truncate_for or 0)
        except ContextOverflow:  # of a text that is too long to be tokenized
            if truncate_for is None:
                raise
            fits = False
        if truncate_for is not None and not fits:
            messages = without_oldest(
                messages,
                lambda kept: n_positions(self.count(kept, image_tokens=image_tokens)),
                self.text.n_ctx - truncate_for,
            )
            counted = self.count(messages, image_tokens=image_tokens)
        if not counted or isinstance(counted[-1], ImageSpan):  # an image gives no logits to sample from
            end = "an image" if counted else "nothing"
            raise InputError(f"chat template: the prompt ends in {end}, expected text before the answer")
        if (needed := n_positions(counted)) >= self.text.n_ctx:
            images = tuple(item.n_tokens for item in counted if isinstance(item, ImageSpan))
            room = self.text.n_ctx - min(Options().max_tokens, self.text.n_ctx // ROOM)
            fewer = fitting_image_tokens(images, room - (needed - sum(images)))
            raise ContextOverflow(needed, self.text.n_ctx, images, self._fitting_context(needed), fewer)
        return messages, counted

    def _fitting_context(self, needed: int) -> int:
        """A context for a prompt and an answer, at most the one of the model's training; 0 if that is too small."""
        trained = int(self.text.metadata.get("llama.context_length", self.text.n_ctx))
        room = needed + Options().max_tokens
        fitting = min(-(-room // CONTEXT_STEP) * CONTEXT_STEP, trained)
        return fitting if needed < fitting else 0

    def _prompt(
        self,
        messages: Sequence[Message],
        counted: list[PromptItem],
        image_tokens: int | None,
        should_stop: ShouldStop | None,
    ) -> tuple[list[PromptItem], dict[str, PreparedImage]]:
        """The prompt with the keys of its images, and these by key. Raises ImageError, Interrupted."""
        images = []
        for source in (image for message in messages for image in message.images):
            _check(should_stop)
            images.append(self.images.process(source).with_tokens(image_tokens))
        _check(should_stop)
        spans = [ImageSpan(image.key, image.n_tokens) for image in images]
        return fill(counted, spans), {image.key: image for image in images}

    def encode_anew(self, image: PreparedImage) -> Features:
        """(n_tokens, n_embd) float32, encoded even if it is remembered; nothing is kept."""
        if image.n_tokens == image.all_tokens:
            return pack([self.vision.encode(tile) for tile in image.tiles], image.layout, self.vision.newline)
        boxes = image.boxes(self.vision.info.grid)
        ranked = [self.vision.encode_ranked(tile, box) for tile, box in zip(image.tiles, boxes, strict=True)]
        tiles, orders = zip(*ranked, strict=True)
        return select(tiles, orders, image.layout, image.n_tokens)

    def encoded(
        self,
        image: PreparedImage,
        should_stop: ShouldStop | None = None,
        on_tile: Callable[[], None] | None = None,
    ) -> Features:
        """(n_tokens, n_embd) float32; each tile is encoded unless it is remembered. on_tile: after each."""
        if image.n_tokens < image.all_tokens:
            tiles, orders = self._ranked(image, should_stop, on_tile)
            return select(tiles, orders, image.layout, image.n_tokens)
        tiles = []
        for key, pixels in zip(image.tile_keys, image.tiles, strict=True):
            _check(should_stop)
            features = self._features.get(key, self.vision.shape)
            if features is None:
                features = self._features.put(key, self.vision.encode(pixels, should_stop))
            tiles.append(features)
            if on_tile is not None:
                on_tile()
        return pack(tiles, image.layout, self.vision.newline)

    def _ranked(
        self,
        image: PreparedImage,
        should_stop: ShouldStop | None,
        on_tile: Callable[[], None] | None = None,
    ) -> tuple[list[Features], list[Order]]:
        """Every tile's features, (n_patches, n_embd), and the order of its patches that are picture."""
        n_patches, boxes = self.vision.info.n_patches, image.boxes(self.vision.info.grid)
        tiles: list[Features] = []
        orders: list[Order] = []
        for key, pixels, box in zip(image.tile_keys, image.tiles, boxes, strict=True):
            _check(should_stop)
            name, n = f"{key} {METHOD} {box}", (box[1] - box[0]) * (box[3] - box[2])
            features = self._features.get(key, self.vision.shape)
            order = self._features.order(name, n, n_patches)
            if features is None or order is None:
                features, order = self.vision.encode_ranked(pixels, box, should_stop)
                features = self._features.put(key, features)
                self._features.put_order(name, order)
            tiles.append(features)
            orders.append(order)
            if on_tile is not None:
                on_tile()
        return tiles, orders

    def _identity(self, path: Path, header: Header | None = None) -> str:
        """A file's SHA-256 where the bundle records it, else what tells it from others without reading it."""
        bundle = self.bundle
        if bundle and path in (bundle.model, bundle.mmproj):
            known = bundle.manifest.files[MODEL if path == bundle.model else MMPROJ].sha256
            return known or file_identity(path, header)
        return file_identity(path, header)


def _template(text: TextModel, bundle: Bundle | None) -> Template:
    """The checkpoint's chat template with the text model's special tokens."""
    vocabulary = text.vocabulary
    own = text.metadata.get("tokenizer.chat_template", "")
    special = vocabulary.special()
    if vocabulary.adds_bos:  # some files do not mark it as a control token
        special.setdefault(vocabulary.text(vocabulary.bos), vocabulary.bos)
    texts = {i: token for token, i in special.items()}
    special.setdefault(IMAGE_TOKEN, max(0, vocabulary.eos))  # no row of its own: any id will do
    keys = {name: text.metadata.get(key) for name, key in NAMED_TOKENS.items()}
    named = {name: vocabulary.text(int(i)) for name, i in keys.items() if i is not None}
    template = Template(
        source=bundle.template if bundle else own if "image" in own else DEFAULT_TEMPLATE,
        special=special,
        image_token=bundle.manifest.image_token if bundle else IMAGE_TOKEN,
        bos=texts.get(vocabulary.bos, ""),
        eos=texts.get(vocabulary.eos, ""),
        add_bos=vocabulary.adds_bos,
        space_prefix=bundle.space_prefix if bundle else "every",
        tokens=named,
        strip=bundle.manifest.strip if bundle else {},
    )
    template.check()
    return template


def _all_tokens(prompt: Sequence[PromptItem], images: Mapping[str, PreparedImage]) -> int:
    """Positions of a prompt's images when none are left out."""
    return sum(images[item.key].all_tokens for item in prompt if isinstance(item, ImageSpan))


def _check(should_stop: Callable[[], bool] | None) -> None:
    if should_stop is not None and should_stop():
        raise Interrupted


class _Work:
    """What a prefill has done so far."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.prompt: list[PromptItem] = []
        self.on_progress = on_progress
        self._total_tiles = self._tiles = 0
        self.n_reused = self.left_out = self.all_image_tokens = 0
        self._seconds = {"preprocess": 0.0, "encode": 0.0, "prompt": 0.0}

    def start_tiles(self, total: int) -> None:
        """So many tiles are to be encoded, or remembered."""
        self._total_tiles = total
        self._report_tiles()

    def count_tile(self) -> None:
        """One more of them is done."""
        self._tiles += 1
        self._report_tiles()

    def _report_tiles(self) -> None:
        if self.on_progress is not None and self._total_tiles:
            self.on_progress(Progress("image", self._tiles, self._total_tiles))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to a stage, however it ends."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - start

    def prefilled(self, token_ids: list[int]) -> Prefilled:
        """What was done."""
        return Prefilled(
            token_ids=token_ids,
            prompt_tokens=n_positions(self.prompt),
            image_tokens=n_positions([item for item in self.prompt if isinstance(item, ImageSpan)]),
            all_image_tokens=self.all_image_tokens,
            cached_tokens=n_positions(self.prompt[: self.n_reused]),
            preprocess_s=self._seconds["preprocess"],
            encode_s=self._seconds["encode"],
            prompt_s=self._seconds["prompt"],
            left_out=self.left_out,
        )

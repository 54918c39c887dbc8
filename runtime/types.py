"""The values that calls take and give. Knows no model, no file format and no engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pocketllava.errors import ImageError, InputError, UnsupportedOption
from pocketllava.json_schema import checked_schema
from pocketllava.settings import changed, check, nearest, option

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    ImageSource = str | PathLike[str] | bytes | BinaryIO | Image.Image | npt.NDArray[np.generic]
else:
    ImageSource = Any

Role = Literal["system", "user", "assistant"]
Messages = Sequence["Message | Mapping[str, Any]"]  # OpenAI's dicts are taken too
Stage = Literal["image", "prompt"]
FinishReason = Literal["stop", "length", "cancelled"]
Truncation = Literal["oldest"]
Bytes = bytes  # under a name that a field `bytes` does not hide
ROLES = ("system", "user", "assistant")
KV_TYPES = ("auto", "f16", "q8_0")
TEMPLATES = ("vicuna_v1", "llava-hf", "mistral", "llama-3", "chatml")  # prompts; convert/pair.py has them
PAIR = ("mmproj", "template", "pad")  # options of a text model without bundle.json
WEIGHTS = ("auto", "memory", "mapped")
FLASH_ATTENTION = ("auto", "on", "off")
GIGA = 1_000_000_000
MAX_INT = 2**31 - 1
MAX_SEED = 2**32 - 2  # llama.cpp takes 2**32 - 1 for "draw one"
MAX_DEVICES = 16  # llama_max_devices()
MAX_THREADS = 512  # GGML_MAX_N_THREADS
MAX_CHOICES = 1000
MAX_TOP_LOGPROBS = 20  # as OpenAI's API
MAX_FILE_BYTES = 192 << 20  # of an image: one of the most pixels that are accepted takes 150 MB, uncompressed


@dataclass(frozen=True, init=False)
class Message:
    """One turn of a conversation. Its images stand before its text, in the order given.

    Args:
        role: "system", "user" or "assistant".
        text: The words.
        images: One image or several: paths, bytes, open binary files, data URIs, PIL images or arrays. A file is
            read now, from its beginning. Only a user shows images.

    Raises:
        InputError: a role, text or image that cannot be one.

    Example:
        >>> Message("user", "What is in this photo?", "photo.jpg").images
        ('photo.jpg',)
    """

    role: Role
    text: str
    images: tuple[ImageSource, ...]

    def __init__(
        self,
        role: Role = "user",
        text: str = "",
        images: ImageSource | Sequence[ImageSource] | None = (),
    ) -> None:
        if role not in ROLES:
            raise InputError(
                f"role: found {role!r}, expected one of {', '.join(ROLES)}{nearest(str(role), ROLES)}"
            )
        _check_text(text)
        sources = as_images(images)
        if sources and role != "user":
            raise InputError(f"images in a {role!r} message: only 'user' messages may hold images")
        for name, value in (("role", role), ("text", text), ("images", sources)):
            object.__setattr__(self, name, value)


class Beginning(Message):
    """The beginning of an answer, last in a conversation: it is gone on with, not answered."""

    def __init__(self, text: str) -> None:
        super().__init__("assistant", text)


@dataclass(frozen=True)
class Options:
    """How an answer is sampled. The default, temperature 0, is greedy decoding, as the reference does.

    Args:
        max_tokens: The most tokens that an answer may have.
        temperature: 0 takes the likeliest token; higher values choose more freely.
        top_p: Keep the fewest tokens that have this share of the probability.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        min_p: Keep tokens at least this likely, as a share of the likeliest one's probability.
        repeat_penalty: Above 1, tokens that were used lately become less likely.
        presence_penalty: Is subtracted from the logit of every token that was used lately.
        frequency_penalty: The same, as often as it was used.
        seed: Repeats what was sampled; None draws a new one for every call.
        stop: A text, or several, that end the answer; they are not part of it.
        image_tokens: Show each picture by at most so many tokens, as in Llava.load; None: as it was loaded.
        truncate: "oldest" leaves out the oldest turns of a conversation that does not fit the context, never the
            system message nor the turn of the last images; None raises ContextOverflow.
        schema: A JSON schema; the answer is JSON that fits it, unless max_tokens cuts it off ("length"). It is
            sampled as any answer is, but texts in `stop` do not end it. {"type": "object"} is any object.
        choices: The answer is one of these texts, the likeliest; Answer.choices has the probability of each. Nothing
            is sampled, so options of sampling change nothing.
        prefill: The answer's beginning: the model goes on from there, and the answer holds what it adds. White space
            at its end is dropped, as tokens begin with theirs. None: none.
        top_logprobs: The log probability of each token of the answer (Answer.logprobs), beside those of so many
            others, from the model's own logits: before penalties, temperature and schema. None: none.

    Raises:
        InputError: a value of another type or outside its range.
        UnsupportedSchema: a schema with a keyword that is not supported, or too large.

    Example:
        >>> Options(max_tokens=64, stop="USER:").stop
        ('USER:',)
    """

    max_tokens: int = option(
        512, "whole", "-n --max-tokens", "The most tokens that an answer may have.", low=1, high=MAX_INT
    )
    temperature: float = option(
        0.0, "number", "--temperature --temp", "0 is greedy, as the reference decodes.", low=0, high=100
    )
    top_p: float = option(
        1.0, "number", "--top-p", "Keep the fewest tokens with this share of the probability.",
        low=0, high=1, above_low=True,
    )  # fmt: skip
    top_k: int = option(
        0, "whole", "--top-k", "Keep the k likeliest tokens; 0 keeps all.", low=0, high=MAX_INT
    )
    min_p: float = option(
        0.0, "number", "--min-p", "Keep tokens at least this likely, beside the likeliest.", low=0, high=1
    )
    repeat_penalty: float = option(
        1.0, "number", "--repeat-penalty", "Above 1, tokens used lately become less likely.",
        low=0, high=100, above_low=True,
    )  # fmt: skip
    presence_penalty: float = option(
        0.0, "number", "--presence-penalty", "Above 0, tokens used lately become less likely, however often.",
        low=-2, high=2,
    )  # fmt: skip
    frequency_penalty: float = option(
        0.0, "number", "--frequency-penalty", "Above 0, tokens used lately become less likely, each time more.",
        low=-2, high=2,
    )  # fmt: skip
    seed: int | None = option(
        None, "whole", "-s --seed", "Repeats what was sampled.", low=0, high=MAX_SEED, optional=True
    )
    stop: Sequence[str] = option(
        (), "texts", "--stop", "Ends the answer where it would appear; repeatable.", metavar="TEXT"
    )
    image_tokens: int | None = option(
        None, "whole", "", "Show each picture by at most so many tokens.", low=1, high=MAX_INT, optional=True
    )
    truncate: Truncation | None = option(
        None, "choice", "--truncate", "Leave out the oldest turns once the conversation does not fit.",
        choices=("oldest",), optional=True,
    )  # fmt: skip
    schema: Mapping[str, Any] | None = option(
        None, "schema", "--schema", "Answer in JSON that fits the JSON schema in FILE.",
        optional=True, metavar="FILE",
    )  # fmt: skip
    choices: Sequence[str] | None = option(
        None, "several", "--choices", "Answer with the likeliest of these texts, and say how likely each is.",
        optional=True, metavar="TEXT,TEXT...",
    )  # fmt: skip
    prefill: str | None = option(
        None, "text", "--prefill", "The answer's beginning; the model goes on from there.",
        optional=True, metavar="TEXT",
    )  # fmt: skip
    top_logprobs: int | None = option(
        None, "whole", "--top-logprobs", "With --json, each token's log probability beside those of N others.",
        low=0, high=MAX_TOP_LOGPROBS, optional=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        if callable(self.stop):
            raise InputError("stop: found a function, expected texts; give a function as should_stop")
        check(self)
        if self.schema is not None:
            object.__setattr__(self, "schema", checked_schema(self.schema))
            if self.prefill is not None:
                raise InputError("prefill: found with schema, expected one of both; JSON begins by itself")
        if self.choices is not None:
            self._check_choices(self.choices)

    def _check_choices(self, choices: Sequence[str]) -> None:
        if len(choices) > MAX_CHOICES:
            raise InputError(f"choices: found {len(choices)}, expected at most {MAX_CHOICES}")
        for name in ("schema", "top_logprobs"):
            if getattr(self, name) is not None:
                raise InputError(f"{name}: found with choices, expected one of both; choices sample nothing")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Args:
        n_ctx: Tokens of context, prompt and answer together; an image takes 576. None: 2048, or less where that
            does not fit the memory.
        n_threads: CPU threads. None: the number of physical cores.
        n_gpu_layers: Layers of the text model on the GPU: -1 for all that fit it, 0 for none (and the vision tower on
            the CPU).
        main_gpu: The only one of several GPUs to use, counted from 0. None: all.
        tensor_split: Shares of the layers that several GPUs take, such as (3, 1). None: as they have memory.
        mmproj_device: Where the vision tower runs: "cpu", or a device's name such as "CUDA1". None: on the
            first of the text model's devices, or the CPU where it has no room there or `exact` forbids it.
        exact: Whether the vision tower runs only where products are summed in F32, as the reference sums them: on the
            CPU, or a device that can. None: for bundles in F32, F16 and BF16, whose tokens are the reference's.
        max_pixels: Refuse larger images. None: 50 megapixels.
        image_tokens: Show each picture by at most so many tokens, the most telling ones (SCOPE): 128 of LLaVA-1.5's
            576 are answered about three times sooner, and keep 97.5 to 97.8 % of the published accuracy. Not for
            coordinates, dense text or counting. None: all of them, the faithful answer.
        kv_type: Type of the KV cache: "f16", or "q8_0" for half the memory. "auto" takes f16, and q8_0 with a warning
            where the model would not load otherwise.
        flash_attn: Flash attention in the text model: "auto" takes it on GPUs for quantized types, and never for F32,
            F16 and BF16, whose tokens are the reference's. "on" suits CPUs and short answers (benchmarks/README.md).
        weights: "memory" reads them, "mapped" maps the file, "auto" does what suits the device and the free memory.
        kept_bytes: Evaluated conversations that show a picture are kept in memory up to this, to go back to: 0.3 GB
            each for a 7B model. None: a quarter of the free memory, at most 4 GB.
        cache_dir: A folder to keep encoded images in, for the next time they are shown.
        cache_bytes: The oldest files in cache_dir go beyond this.
        keep_prefixes: Keep evaluated images in cache_dir too, 0.3 GB each for a 7B model.
        mmproj: The vision part of a GGUF text model. None: the one that lies beside it.
        template: Prompt of a GGUF text model: "vicuna_v1", "llava-hf", "mistral", "llama-3" or "chatml". None: its
            own, or what its vocabulary lets one assume.
        pad: Pad the pictures of a GGUF text model to a square (True), or crop them (False). None: as its kind does.

    Raises:
        UnsupportedOption: a value of another type or outside its range.
    """

    n_ctx: int | None = option(
        None, "whole", "-c --ctx", "Context in tokens, prompt and answer together; an image takes 576.",
        low=1, high=MAX_INT, optional=True, default_text="2048",
    )  # fmt: skip
    n_threads: int | None = option(
        None, "whole", "-t --threads", "CPU threads.",
        low=1, high=MAX_THREADS, optional=True, default_text="physical cores",
    )  # fmt: skip
    n_gpu_layers: int = option(
        -1, "whole", "-ngl --gpu-layers", "Layers of the text model on the GPU; -1 all, 0 none.", low=-1, high=MAX_INT
    )  # fmt: skip
    main_gpu: int | None = option(
        None, "whole", "--main-gpu", "The only one of several GPUs to use, counted from 0.",
        low=0, high=MAX_DEVICES - 1, optional=True, default_text="all",
    )  # fmt: skip
    tensor_split: Sequence[float] | None = option(
        None, "shares", "--tensor-split", "Shares of the layers that several GPUs take, such as 3,1.",
        optional=True, default_text="as they have memory", metavar="N,N,...",
    )  # fmt: skip
    mmproj_device: str | None = option(
        None, "text", "--mmproj-device", "Where the vision tower runs: cpu, or a device's name such as CUDA1.",
        optional=True, default_text="the text model's first device", metavar="NAME",
    )  # fmt: skip
    exact: bool | None = option(
        None, "switch", "--exact/--fast", "Run the vision tower only where it sums in F32 as the reference does.",
        optional=True, default_text="exact for F32, F16 and BF16",
    )  # fmt: skip
    max_pixels: int | None = option(
        None, "whole", "--max-pixels", "Refuse larger images.",
        low=1, optional=True, default_text="50 million",
    )  # fmt: skip
    image_tokens: int | None = option(
        None, "whole", "--image-tokens",
        "Show each picture by at most so many tokens; 128 of 576 answer three times sooner, but are bad at"
        " coordinates, dense text and counting.",
        low=1, high=MAX_INT, optional=True, default_text="all",
    )  # fmt: skip
    kv_type: str = option(
        KV_TYPES[0], "choice", "--kv-type",
        "Type of the KV cache; q8_0 takes half the memory of f16, auto takes it where f16 does not fit.",
        choices=KV_TYPES,
    )  # fmt: skip
    flash_attn: str = option(
        FLASH_ATTENTION[0], "choice", "-fa --flash-attn",
        "Flash attention; auto takes it on GPUs for quantized types.", choices=FLASH_ATTENTION,
    )  # fmt: skip
    weights: str = option(
        WEIGHTS[0], "choice", "--weights",
        "Read the weights into memory, or map the file; auto does what suits the free memory.", choices=WEIGHTS,
    )  # fmt: skip
    kept_bytes: int | None = option(
        None, "whole", "--kept-size", "Keep evaluated conversations in memory up to this; 0 keeps none.",
        low=0, unit=GIGA, optional=True, default_text="a quarter of what is free, at most 4", metavar="GB",
    )  # fmt: skip
    cache_dir: str | PathLike[str] | None = option(
        None, "folder", "--cache-dir", "Keep encoded images there, for the next time they are shown.",
        optional=True, metavar="DIR", variable="POCKETLLAVA_CACHE_DIR",
    )  # fmt: skip
    cache_bytes: int = option(
        4 * GIGA, "whole", "--cache-size", "The oldest files in DIR go beyond this.", low=1, unit=GIGA, metavar="GB"
    )  # fmt: skip
    keep_prefixes: bool = option(
        False, "switch", "--keep-prefixes", "Keep evaluated images in DIR too, 0.3 GB each for a 7B model."
    )
    mmproj: str | PathLike[str] | None = option(
        None, "file", "--mmproj", "The vision part of a GGUF text model.",
        optional=True, default_text="beside it", metavar="FILE",
    )  # fmt: skip
    template: str | None = option(
        None, "choice", "--template", "Prompt of a GGUF text model.",
        choices=TEMPLATES, optional=True, default_text="its own, or its kind's",
    )  # fmt: skip
    pad: bool | None = option(
        None, "switch", "--pad/--crop", "Pad the pictures of a GGUF text model to a square, or crop them.",
        optional=True, default_text="as its kind does",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self, UnsupportedOption)
        if self.kv_type == "q8_0" and self.flash_attn == "off":
            raise UnsupportedOption(
                "flash_attn: found 'off' with kv_type 'q8_0', which llama.cpp has with flash attention only; leave"
                " one of them out"
            )
        if self.main_gpu is not None and self.tensor_split is not None:
            raise UnsupportedOption("tensor_split: expected several GPUs to split over; leave main_gpu out")
        if self.keep_prefixes and self.cache_dir is None:
            raise UnsupportedOption(
                "keep_prefixes: expected a folder to keep them in; give cache_dir as well"
            )


@dataclass(frozen=True)
class Progress:
    """How far the work before an answer is: `done` of `total` tiles ("image") or positions ("prompt")."""

    stage: Stage
    done: int
    total: int


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Timings:
    """Where the time of one answer went, in seconds, and how much was evaluated.

    queue_s is the wait for calls that came before; preprocess_s decodes and resizes images, encode_s computes their
    features; prompt_s is prompt evaluation (text and image positions) without image encoding;
    prompt_tokens counts the whole prompt, image_tokens its image positions, all_image_tokens those that its pictures
    take when none are left out, cached_tokens those that were evaluated for an earlier call;
    first_token_s runs from the call to the first token, all of these included; devices names what evaluated the text
    model and the vision tower; left_out counts the messages that truncate="oldest" left out.
    """

    load_s: float = 0.0
    queue_s: float = 0.0
    preprocess_s: float = 0.0
    encode_s: float = 0.0
    prompt_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    image_tokens: int = 0
    all_image_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    devices: tuple[str, str] = ("", "")
    left_out: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed: tokens after the first, divided by the time they took."""
        return (self.answer_tokens - 1) / self.decode_s if self.answer_tokens > 1 and self.decode_s else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability, from the model's own logits: before penalties, temperature and schema.

    token is its text, with U+FFFD where its bytes are half a character; top lists the likeliest tokens, as
    (token, logprob, bytes).
    """

    token: str
    logprob: float
    bytes: Bytes
    top: tuple[tuple[str, float, Bytes], ...] = ()


@dataclass(frozen=True)
class Choice:
    """One of Options.choices, and how likely it is among them."""

    text: str
    probability: float


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer; its str is its text. The last one carries finish_reason, timings and choices.

    logprobs has one entry a token if Options.top_logprobs asks for them.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    choices: tuple[Choice, ...] = ()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Usage:
    """Tokens of one call, as OpenAI's API counts them: cached_tokens and image_tokens are part of prompt_tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Answer:
    """A whole answer; its str is its text. token_ids are those that were sampled, without the end token.

    logprobs: one entry a token, if Options.top_logprobs asked for them. choices: Options.choices, the likeliest first.
    """

    text: str
    token_ids: tuple[int, ...]
    timings: Timings
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    choices: tuple[Choice, ...] = ()

    def __str__(self) -> str:
        return self.text

    @property
    def margin(self) -> float | None:
        """By how much the likeliest choice is ahead of the next, 0 to 1; None without choices."""
        if not self.choices:
            return None
        return self.choices[0].probability - (self.choices[1].probability if len(self.choices) > 1 else 0.0)

    @property
    def usage(self) -> Usage:
        """Tokens of the prompt and the answer."""
        t = self.timings
        total = t.prompt_tokens + t.answer_tokens
        return Usage(t.prompt_tokens, t.answer_tokens, total, t.cached_tokens, t.image_tokens)


@dataclass(frozen=True)
class Trace:
    """One picture followed through the model, from a real evaluation.

    pixel_shape (3, H, W); grid (rows, columns) of patches; vision_shape (n_patches, vision width);
    feature_shape (image tokens, text width); tiles (rows, columns) of a tiled picture, whose base comes first;
    unpadded (rows, columns) of the tiles' patches without padding; image_positions: first and last position in the
    prompt;
    token_ids: the whole prompt, image positions filled with the image token's id;
    embeddings_match: whether the text model's input embeddings at those positions, read from its own
    graph, are the projected image features, and max_difference the largest absolute difference.
    """

    pixel_shape: tuple[int, int, int]
    grid: tuple[int, int]
    vision_shape: tuple[int, int]
    feature_shape: tuple[int, int]
    image_positions: tuple[int, int]
    token_ids: tuple[int, ...]
    token_texts: tuple[str, ...] = field(repr=False)
    embeddings_match: bool
    max_difference: float
    class_token_corrected: bool
    tiles: tuple[int, int] | None = None
    unpadded: tuple[int, int] | None = None


def sampling(options: Options | None = None, **changes: Any) -> Options:
    """Options, or the default ones, with the given fields changed. Raises InputError."""
    if options is not None and not isinstance(options, Options):
        raise InputError(f"options: found {type(options).__name__}, expected pocketllava.Options")
    return changed(options or Options(), changes)


def load_options(**load: Any) -> LoadOptions:
    """The default options for loading, with the given fields changed. Raises UnsupportedOption."""
    return changed(LoadOptions(), load, UnsupportedOption)


def conversation(
    image: ImageSource | Sequence[ImageSource] | None, question: str, system: str | None = None
) -> list[Message]:
    """A system message, if any, and one question about the images."""
    return [*([Message("system", system)] if system else []), Message("user", question, image)]


def as_images(image: ImageSource | Sequence[ImageSource] | None) -> tuple[ImageSource, ...]:
    """One image, several or none, as several. Raises ImageError for what is no image's source."""
    if image is None:
        return ()
    return tuple(map(_source, image)) if isinstance(image, list | tuple) else (_source(image),)


def _source(image: Any) -> ImageSource:
    """An image's source; an open file's bytes, so that it is read once."""
    if callable(getattr(image, "read", None)):
        return read_file(image)
    # PIL images and arrays have this attribute; asking an instance for it would copy the pixels
    if not isinstance(image, str | PathLike | bytes | bytearray | memoryview) and not hasattr(
        type(image), "__array_interface__"
    ):
        raise ImageError(
            f"image: found {type(image).__name__}, expected a path, bytes, an open file, a data URI, a PIL image or"
            " an array"
        )
    source: ImageSource = image
    return source


def read_file(file: Any) -> bytes:
    """All of an open binary file, from its beginning where it can seek: after writing, it stands at the end."""
    try:
        if file.seekable():
            file.seek(0)
        data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError, AttributeError) as error:
        raise ImageError(f"image file: cannot be read ({error})") from error
    if not isinstance(data, bytes) or len(data) > MAX_FILE_BYTES:
        expected = f"a binary file of at most {MAX_FILE_BYTES >> 20} MiB"
        raise ImageError(
            f"image file: found {type(data).__name__} of length {len(data)}, expected {expected}"
        )
    return data


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise InputError(f"message text: found {type(text).__name__}, expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"message text: found half a character at {error.start} ({text[error.start]!r}); expected whole ones"
        ) from None

"""The values that calls take and give. Knows no model, no file format and no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from pocketllava.errors import InputError, UnsupportedOption

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    ImageSource = str | PathLike[str] | bytes | Image.Image | npt.NDArray[np.generic]
else:
    ImageSource = Any

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled"]
ROLES = ("system", "user", "assistant")
KV_TYPES = ("f16", "q8_0")
WEIGHTS = ("auto", "memory", "mapped")
GIGA = 1_000_000_000


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. `images` stand before the text, in the order given."""

    role: Role
    text: str
    images: Sequence[ImageSource] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"role: found {self.role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(self.text, str):
            raise InputError(f"message text: found {type(self.text).__name__}, expected str")
        if not isinstance(self.images, list | tuple):
            found = type(self.images).__name__
            raise InputError(f"message images: found {found}, expected a list or tuple of images")
        if self.images and self.role != "user":
            raise InputError(f"images in a {self.role!r} message: only 'user' messages may hold images")


@dataclass(frozen=True)
class Options:
    """How an answer is sampled. The default, temperature 0, is greedy decoding, as the reference does.

    max_tokens: upper bound on the answer's length, in tokens.
    top_k: keep the k most likely tokens (0 keeps all). top_p: keep the smallest set with that mass.
    seed: None draws a new one for every call. stop: texts that end the answer; they are not part of it.
    shift: leave out the oldest turns of a conversation that does not fit the context, never the system
    message nor the turn of the last images, instead of raising ContextOverflow.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    shift: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._expect("max_tokens", self.max_tokens >= 1, "a whole number of at least 1")
        self._expect("temperature", 0.0 <= self.temperature <= 100.0, "0 (greedy) to 100")
        self._expect("top_p", 0.0 < self.top_p <= 1.0, "more than 0, at most 1")
        self._expect("top_k", 0 <= self.top_k < 2**31, "0 (off) or more")
        self._expect("seed", self.seed is None or 0 <= self.seed < 2**32, "None or 0 to 4294967295")
        self._expect("stop", all(isinstance(s, str) and s for s in self.stop), "texts that are not empty")

    def _expect(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise InputError(f"{name}: found {getattr(self, name)!r}, expected {expected}")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded; Llava.load says what each means."""

    n_ctx: int | None = None
    n_threads: int | None = None
    n_gpu_layers: int = -1
    max_pixels: int | None = None
    kv_type: str = KV_TYPES[0]
    weights: str = WEIGHTS[0]
    cache_dir: str | PathLike[str] | None = None
    cache_bytes: int = 4 * GIGA
    keep_prefixes: bool = False

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise UnsupportedOption(f"kv_type: found {self.kv_type!r}, expected one of {', '.join(KV_TYPES)}")
        if self.weights not in WEIGHTS:
            raise UnsupportedOption(f"weights: found {self.weights!r}, expected one of {', '.join(WEIGHTS)}")
        if self.n_threads is not None and self.n_threads < 1:
            raise UnsupportedOption(f"n_threads: found {self.n_threads}, expected at least 1")
        if self.cache_bytes < 1:
            raise UnsupportedOption(f"cache_bytes: found {self.cache_bytes}, expected at least 1")
        if self.keep_prefixes and self.cache_dir is None:
            raise UnsupportedOption(
                "keep_prefixes: expected a folder to keep them in; give cache_dir as well"
            )


@dataclass(frozen=True)
class Timings:
    """Where the time of one answer went, in seconds, and how much was evaluated.

    prompt_s is prompt evaluation (text and image positions) without image encoding;
    prompt_tokens counts the whole prompt, kept_tokens those that were evaluated for an earlier call;
    first_token_s runs from the call to the first token, image work included;
    devices names what evaluated the text model and the vision tower; left_out counts the messages that
    Options.shift left out.
    """

    load_s: float = 0.0
    prepare_s: float = 0.0
    encode_s: float = 0.0
    prompt_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    image_tokens: int = 0
    kept_tokens: int = 0
    answer_tokens: int = 0
    devices: tuple[str, str] = ("", "")
    left_out: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed: tokens after the first, divided by the time they took."""
        return (self.answer_tokens - 1) / self.decode_s if self.answer_tokens > 1 and self.decode_s else 0.0


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer. The last one carries finish_reason and timings."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer. `token_ids` are those that were sampled, the end-of-sequence token left out."""

    text: str
    token_ids: tuple[int, ...]
    timings: Timings
    finish_reason: FinishReason


@dataclass(frozen=True)
class Trace:
    """One picture followed through the model, from a real evaluation.

    pixel_shape (3, H, W); grid (rows, columns); vision_shape (n_patches, vision width);
    feature_shape (n_patches, text width); image_positions: first and last position in the prompt;
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


def conversation(
    image: ImageSource | Sequence[ImageSource] | None, question: str, system: str | None = None
) -> list[Message]:
    """A system message, if any, and one question about the images."""
    first = [Message("system", system)] if system else []
    return [*first, Message("user", question, () if image is None else as_images(image))]


def as_images(image: ImageSource | Sequence[ImageSource]) -> tuple[ImageSource, ...]:
    """One image or several, as several."""
    images: Any = image if isinstance(image, list | tuple) else (image,)
    return tuple(images)

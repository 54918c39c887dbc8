"""The error tree. Knows nothing else; imports nothing.

PocketLlavaError
├── InputError               an argument that cannot be used
│   ├── ImageError           not an image, too large, or not a source we open
│   ├── ContextOverflow      the prompt does not fit: .needed, .available, .image_tokens, .fitting*
│   ├── UnsupportedOption    a setting this build or model cannot honor
│   └── UnsupportedSchema    a JSON schema that an answer cannot be held to; names the keyword
├── StateError               a model used after close() or fork(), a stream that a newer call ended
├── ModelNotFound            no bundle of that name; names the nearest, and the command that makes one
├── BundleError              a bundle's file is missing, damaged or foreign
├── DownloadError            the hub, or the way to it, did not give a file
├── ConvertError             a checkpoint cannot be converted
│   ├── UnsupportedCheckpoint   another architecture, named
│   ├── TensorMismatch          .missing, .unexpected, .shape
│   └── DiskFull                .needed_bytes, .available_bytes
└── BackendError             llama.cpp could not load or evaluate
    ├── OutOfMemory          a model does not fit: .needed_bytes, .available_bytes, .plan
    └── EngineDied           the child of an isolated model ended, or a device failed; the next call loads it again

A message is one line: the thing, what was found, what was expected, what to do. Whatever it quotes, it has at
most MAX_CHARACTERS printable characters. Every error pickles, fields included.
"""

from __future__ import annotations

from typing import Any

MAX_CHARACTERS = 1000
ELLIPSIS = " ... "
LISTED_IMAGES = 8


class PocketLlavaError(Exception):
    """Base of every error this package raises on purpose."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Exception's own would call the class with the message alone, which ContextOverflow does not take."""
        return _restored, (type(self), self.args, self.__dict__)


class InputError(PocketLlavaError):
    """An argument cannot be used."""


class ImageError(InputError):
    """An image could not be opened, is too large, or comes from a source that is not opened."""


class ContextOverflow(InputError):
    """The prompt needs `needed` tokens and the context has room for `available`.

    image_tokens: how many of the needed ones each image takes. fitting: a context that holds the prompt, 0 where the
    model was trained on none, None where that is not known. fitting_image_tokens: how many each image may take at
    most for the prompt and an answer to fit as it is; None where too few would be left, or where that is not known.
    """

    def __init__(
        self,
        needed: int,
        available: int,
        image_tokens: tuple[int, ...] = (),
        fitting: int | None = None,
        fitting_image_tokens: int | None = None,
    ) -> None:
        self.needed = needed
        self.available = available
        self.image_tokens = image_tokens
        self.fitting = fitting
        self.fitting_image_tokens = n = fitting_image_tokens
        advice = (
            f" or load with {f'n_ctx={fitting} (--ctx {fitting})' if fitting else 'a larger n_ctx (--ctx)'}"
        )
        fewer = f", show each image by image_tokens={n} (--image-tokens {n})" if n else ""
        super().__init__(
            f"prompt: {needed} tokens (and one for an answer) do not fit a context of {available};"
            f"{_images(image_tokens)} shorten the conversation{fewer}"
            + (advice if fitting != 0 else ", the model was trained on no context that holds it")
        )


class UnsupportedOption(InputError):
    """A setting that this build of llama.cpp or this model cannot honor."""


class UnsupportedSchema(InputError):
    """A JSON schema that no answer can be held to: a keyword that is not supported, a limit that it exceeds."""


class StateError(PocketLlavaError):
    """A model was closed or belongs to the parent process, or a newer call ended a stream."""


class ModelNotFound(PocketLlavaError):
    """There is no bundle at the given place."""


class BundleError(PocketLlavaError):
    """A file of a bundle is missing, damaged or belongs to another model."""


class DownloadError(PocketLlavaError):
    """A file could not be downloaded, or is not what the hub said it is."""


class ConvertError(PocketLlavaError):
    """A checkpoint cannot be converted."""


class UnsupportedCheckpoint(ConvertError):
    """The checkpoint is of a kind that pocketllava does not convert."""


class TensorMismatch(ConvertError):
    """The checkpoint's tensors are not those that its config.json describes."""

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self.missing = missing
        self.unexpected = unexpected
        self.shape = shape
        super().__init__(message)


class DiskFull(ConvertError):
    """The files would not fit on the disk."""

    def __init__(self, message: str, needed_bytes: int, available_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        super().__init__(message)


class BackendError(PocketLlavaError):
    """llama.cpp could not load a file or evaluate a batch."""


class OutOfMemory(BackendError):
    """A model does not fit the memory that there is. plan: every part and what would make it fit, in lines."""

    def __init__(self, message: str, needed_bytes: int = 0, available_bytes: int = 0, plan: str = "") -> None:
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes
        self.plan = plan
        super().__init__(message)


class EngineDied(BackendError):
    """The child process that held the model ended, or the model's device failed. The next call loads it again."""


def one_line(text: str) -> str:
    """At most MAX_CHARACTERS printable characters: spaces for line breaks, escapes for the unprintable.

    A long text loses its middle: the beginning names the thing and the end says what to do.
    """
    return _shortened("".join(map(_printable, _shortened(text.strip()))))


def _shortened(text: str) -> str:
    half = (MAX_CHARACTERS - len(ELLIPSIS)) // 2
    return text if len(text) <= MAX_CHARACTERS else f"{text[:half]}{ELLIPSIS}{text[-half:]}"


def _printable(character: str) -> str:
    if character in "\r\n\t":
        return " "
    return character if character.isprintable() else ascii(character)[1:-1]


def _restored(
    kind: type[PocketLlavaError], args: tuple[str, ...], fields: dict[str, Any]
) -> PocketLlavaError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


def _images(tokens: tuple[int, ...]) -> str:
    """How many tokens each image takes; of many, the sum."""
    if not tokens:
        return ""
    if len(tokens) == 1:
        return f" its image takes {tokens[0]};"
    each = " + ".join(map(str, tokens)) + " = " if len(tokens) <= LISTED_IMAGES else ""
    return f" its {len(tokens)} images take {each}{sum(tokens)};"

"""The error tree. Knows nothing else; imports nothing.

PocketLlavaError
├── InputError               what the caller passed in
│   ├── ImageError           not an image, too large, or not a source we open
│   ├── ContextOverflow      the prompt does not fit: .needed and .available tokens
│   └── UnsupportedOption    a setting this build or model cannot honor
├── StateError               used after close(), or a stream that a newer call ended
├── ModelNotFound            no bundle there; names what was looked for
├── BundleError              a bundle's file is missing, damaged or foreign
├── ConvertError             a checkpoint cannot be converted
│   ├── UnsupportedCheckpoint   another architecture, named
│   ├── TensorMismatch          .missing, .unexpected, .shape
│   └── DiskFull                .needed_bytes, .available_bytes
└── BackendError             llama.cpp could not load or evaluate

Every message is one line: the thing, what was found, what was expected, what to do.
"""

from __future__ import annotations


class PocketLlavaError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(PocketLlavaError):
    """What the caller passed in cannot be used."""


class ImageError(InputError):
    """An image could not be opened, is too large, or comes from a source that is not opened."""


class ContextOverflow(InputError):
    """The prompt needs `needed` tokens and the context has room for `available`."""

    def __init__(self, needed: int, available: int) -> None:
        self.needed = needed
        self.available = available
        super().__init__(
            f"prompt: {needed} tokens (and one for an answer) do not fit a context of {available};"
            " shorten the conversation or load with a larger n_ctx (--ctx)"
        )


class UnsupportedOption(InputError):
    """A setting that this build of llama.cpp or this model cannot honor."""


class StateError(PocketLlavaError):
    """A model or stream cannot do this any more: closed, or ended by a newer call."""


class ModelNotFound(PocketLlavaError):
    """There is no bundle at the given place."""


class BundleError(PocketLlavaError):
    """A file of a bundle is missing, damaged or belongs to another model."""


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

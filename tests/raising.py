"""One error of each kind, and a function that a worker's process can import to raise them."""

from __future__ import annotations

from pocketllava import (
    BackendError,
    BundleError,
    ContextOverflow,
    ConvertError,
    DiskFull,
    DownloadError,
    EngineDied,
    ImageError,
    InputError,
    ModelNotFound,
    OutOfMemory,
    PocketLlavaError,
    StateError,
    TensorMismatch,
    UnsupportedCheckpoint,
    UnsupportedOption,
    UnsupportedSchema,
)

ONE_OF_EACH = [
    *(
        kind(f"{kind.__name__}: a thing")
        for kind in (
            PocketLlavaError, InputError, ImageError, UnsupportedOption, UnsupportedSchema, StateError, ModelNotFound, BundleError,
            ConvertError, UnsupportedCheckpoint, BackendError, EngineDied,
        )
    ),
    ContextOverflow(5000, 2048),
    TensorMismatch("tensors: two are missing", missing=("a", "b"), unexpected=("c",), shape=(3, 4)),
    DownloadError("model.gguf: not whole"),
    OutOfMemory("model: does not fit", 10**10, 10**9, "weights 9 GB\ntoo large"),
    DiskFull("disk: too small", 10**12, 10**9),
]  # fmt: skip


def raise_number(n: int) -> None:
    """Runs in a worker process."""
    raise ONE_OF_EACH[n]

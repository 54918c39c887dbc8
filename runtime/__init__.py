"""pocketllava: LLaVA-1.5 with llama.cpp, with the original model's own answers.

Importing it is quick: llama_cpp, numpy and Pillow are imported by the first call that needs them. Programs that hold a
llama_cpp.Llama take LlavaChatHandler from `pocketllava.integrations.llama_cpp`.
"""

from pocketllava.engine.preparation import Preparation
from pocketllava.errors import (
    BackendError,
    BundleError,
    ContextOverflow,
    ConvertError,
    DiskFull,
    ImageError,
    InputError,
    ModelNotFound,
    PocketLlavaError,
    StateError,
    TensorMismatch,
    UnsupportedCheckpoint,
    UnsupportedOption,
)
from pocketllava.llava import Llava
from pocketllava.models import Bundle
from pocketllava.types import Answer, Chunk, LoadOptions, Message, Options, Timings, Trace, Usage
from pocketllava.version import __version__

__all__ = [
    "Answer",
    "BackendError",
    "Bundle",
    "BundleError",
    "Chunk",
    "ContextOverflow",
    "ConvertError",
    "DiskFull",
    "ImageError",
    "InputError",
    "Llava",
    "LoadOptions",
    "Message",
    "ModelNotFound",
    "Options",
    "PocketLlavaError",
    "Preparation",
    "StateError",
    "TensorMismatch",
    "Timings",
    "Trace",
    "UnsupportedCheckpoint",
    "UnsupportedOption",
    "Usage",
    "__version__",
]

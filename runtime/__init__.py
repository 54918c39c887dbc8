"""pocketllava: LLaVA-1.5 with llama.cpp, with the original model's own answers.

Importing it is quick: nothing here loads llama_cpp, numpy or Pillow; what needs them loads them when
it is first used. Programs that already hold a llama_cpp.Llama take LlavaChatHandler from
`pocketllava.integrations.llama_cpp`.
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
from pocketllava.types import Answer, Chunk, Message, Options, Timings, Trace
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
    "__version__",
]

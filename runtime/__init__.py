"""pocketllava: LLaVA-1.5 and 1.6 with llama.cpp, with the original model's own answers.

Importing it takes no time: a public name's module is imported when the name is first used (PEP 562), and llama_cpp,
numpy and Pillow by the first call that needs them. Programs that hold a llama_cpp.Llama take LlavaChatHandler from
`pocketllava.integrations.llama_cpp`.
"""

from __future__ import annotations

from pocketllava.version import __version__

TYPE_CHECKING = False  # what type checkers take for true; importing typing would take half of the time

if TYPE_CHECKING:
    from pocketllava.engine.preparation import Preparation
    from pocketllava.errors import (
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
    from pocketllava.llava import Llava
    from pocketllava.models import Bundle
    from pocketllava.types import (
        Answer,
        Choice,
        Chunk,
        LoadOptions,
        Message,
        Options,
        Progress,
        Timings,
        TokenLogprob,
        Trace,
        Usage,
    )

__all__ = [
    "Answer",
    "BackendError",
    "Bundle",
    "BundleError",
    "Choice",
    "Chunk",
    "ContextOverflow",
    "ConvertError",
    "DiskFull",
    "DownloadError",
    "EngineDied",
    "ImageError",
    "InputError",
    "Llava",
    "LoadOptions",
    "Message",
    "ModelNotFound",
    "Options",
    "OutOfMemory",
    "PocketLlavaError",
    "Preparation",
    "Progress",
    "StateError",
    "TensorMismatch",
    "Timings",
    "TokenLogprob",
    "Trace",
    "UnsupportedCheckpoint",
    "UnsupportedOption",
    "UnsupportedSchema",
    "Usage",
    "__version__",
]

if not TYPE_CHECKING:
    _HOMES = {
        "Bundle": "models",
        "Llava": "llava",
        "Preparation": "engine.preparation",
        **dict.fromkeys(
            (
                "Answer",
                "Choice",
                "Chunk",
                "LoadOptions",
                "Message",
                "Options",
                "Progress",
                "Timings",
                "TokenLogprob",
                "Trace",
                "Usage",
            ),
            "types",
        ),
    }

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        globals()[name] = value = getattr(import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

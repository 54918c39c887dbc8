"""Every private name of llama_cpp that this package uses: an upgrade that moves one fails here, with one message.

Knows names and where they are; what they do is said where they are used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from pocketllava.errors import BackendError

VERSIONS = ">=0.3.36,<0.4"  # pyproject.toml's requirement
MODULE_NAMES = {
    "llama_cpp._ctypes_extensions": ("load_shared_library",),
    "llama_cpp._ggml": ("libggml",),
    "llama_cpp._internals": ("suppress_stdout_stderr",),
    "llama_cpp.llama": ("suppress_stdout_stderr",),
    "llama_cpp.llama_chat_format": ("_convert_completion_to_chat",),
}
# Attributes of a Llama: its record of evaluated tokens, whether the last logits can be sampled from, and what makes
# the chain that samples them.
LLAMA_ATTRIBUTES = ("input_ids", "n_tokens", "scores", "_requires_eval", "_init_sampler")


def private(module: str, name: str) -> Any:
    """llama_cpp's own `module.name`, which MODULE_NAMES lists. Raises BackendError if this version has none."""
    if name not in MODULE_NAMES[module]:
        raise KeyError(f"{module}.{name} is not listed in {__name__}")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise moved(f"{module}.{name}") from error


def check_llama(llama: Any) -> None:
    """Raise BackendError unless a Llama has the attributes that the KV cache's record needs."""
    for name in LLAMA_ATTRIBUTES:
        if not hasattr(llama, name):
            raise moved(f"Llama.{name}")


def set_fields(structure: Any, **values: Any) -> None:
    """Set fields of a ctypes structure, which itself takes any name and keeps silent. Raises BackendError."""
    names = {field[0] for field in structure._fields_}
    for name, value in values.items():
        if name not in names:
            raise moved(f"{type(structure).__name__}.{name}")
        setattr(structure, name, value)


def library_version() -> str:
    """The installed llama-cpp-python, such as "0.3.36"."""
    return version("llama-cpp-python")


def moved(name: str) -> BackendError:
    """The error for a name that this version of llama-cpp-python lacks."""
    return BackendError(
        f"llama-cpp-python {library_version()}: no {name}, expected a version {VERSIONS}; upgrade pocketllava,"
        " or install llama-cpp-python 0.3.36"
    )

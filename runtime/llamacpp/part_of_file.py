"""Lets llama_cpp.Llama load a GGUF file that lies inside another, such as a llamafile's, where it lies.

llama_cpp opens paths; libllama also takes a FILE that stands where the GGUF file begins, and maps it from there. Knows
FILEs of the C library that Python and libllama share on POSIX; no model.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pocketllava.errors import BackendError
from pocketllava.models.files import open_regular
from pocketllava.models.gguf_header import Part

_WANTED: ContextVar[Part | None] = ContextVar("part of a file", default=None)


@contextmanager
def loaded_from(part: Part) -> Iterator[None]:
    """While this thread makes a Llama: its model is read from that part of its file. Raises BackendError."""
    from llama_cpp import llama_cpp

    if os.name != "posix":
        raise BackendError(
            f"{part.path}: llama.cpp cannot read from the middle of a file on this system; extract it"
        )
    if not hasattr(llama_cpp.llama_model_load_from_file, "by_path"):
        _install(llama_cpp)
    token = _WANTED.set(part)
    try:
        yield
    finally:
        _WANTED.reset(token)


def _install(llama_cpp: Any) -> None:
    """llama_cpp's Llama finds this function by its name."""
    by_path = llama_cpp.llama_model_load_from_file

    def load(path: bytes, params: Any) -> Any:
        part = _WANTED.get()
        return by_path(path, params) if part is None else _load(llama_cpp, part, params)

    load.by_path = by_path  # type: ignore[attr-defined]
    llama_cpp.llama_model_load_from_file = load


def _load(llama_cpp: Any, part: Part, params: Any) -> Any:
    """The map outlives the FILE."""
    libc = ctypes.CDLL(None)
    libc.fdopen.restype, libc.fdopen.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_char_p)
    libc.fseeko.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    libc.fclose.argtypes = (ctypes.c_void_p,)
    with open_regular(part.path) as file:
        stream = libc.fdopen(os.dup(file.fileno()), b"rb")
    try:
        libc.fseeko(stream, part.start, os.SEEK_SET)
        return llama_cpp.llama_model_load_from_file_ptr(stream, params)
    finally:
        libc.fclose(stream)

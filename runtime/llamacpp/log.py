"""llama.cpp's log goes to `logging`, line by line; and whoever loads something can read along.

Knows the three log callbacks, and that a dot is one more percent of a model loaded; nothing else of what is logged.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from pocketllava.llamacpp.private import private

logger = logging.getLogger("pocketllava.llama")
logging.getLogger("pocketllava").addHandler(logging.NullHandler())  # nothing on stderr unless asked for

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}  # enum ggml_log_level
_recent: deque[str] = deque(maxlen=200)
_readers: list[list[str]] = []
_watchers: list[Callable[[str], None]] = []
_failures: list[str] = []
# ggml-metal-context.m: what was computed is lost, but the call that waited for it reports nothing. The next one fails,
# as all do until the backend is made anew.
FAILED = re.compile(r"command buffer -?\d+ failed with status|error state from a previous command buffer")
_unremarked = threading.local()
_stderr_taken = threading.RLock()
COMPLAINT = b"ggml_vulkan: "
PROGRESS = "."  # what llama.cpp's default progress callback logs


@functools.lru_cache(maxsize=1)
def capture_log() -> Any:
    """Send every line that llama.cpp, ggml and libmtmd log to `logging` (pocketllava.llama); once."""
    import llama_cpp
    from llama_cpp import mtmd_cpp

    def on_log(level: int, text: bytes, _user_data: Any) -> None:
        line = text.decode("utf-8", "replace").rstrip("\n")
        for call in _watchers:
            call(line)
        if line == PROGRESS:
            return
        if line.strip() and getattr(_unremarked, "inside", False):
            logger.debug("tried: %s", line)
        elif line.strip():
            _recent.append(line)
            if FAILED.search(line):
                _failures.append(line.strip())
            for lines in _readers:
                lines.append(line)
            logger.log(_LEVELS.get(level, logging.DEBUG), "%s", line)

    callback = llama_cpp.llama_log_callback(on_log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_log_set(callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(callback, ctypes.c_void_p(0))
    return callback  # the cache keeps it alive as long as the process


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    """All that llama.cpp logs inside the block, as it comes."""
    capture_log()
    lines: list[str] = []
    _readers.append(lines)
    try:
        yield lines
    finally:
        _readers[:] = [reader for reader in _readers if reader is not lines]


@contextlib.contextmanager
def unremarked() -> Iterator[None]:
    """Inside the block, what this thread makes llama.cpp complain about is an answer, no error."""
    capture_log()
    before = getattr(_unremarked, "inside", False)
    _unremarked.inside = True
    try:
        with _without_complaints():
            yield
    finally:
        _unremarked.inside = before


@contextlib.contextmanager
def _without_complaints() -> Iterator[None]:
    """What ggml-vulkan.cpp writes to stderr, past the log, is left out; what others write comes through afterwards."""
    with _stderr_taken, tempfile.TemporaryFile() as kept:
        try:
            stderr = os.dup(2)
        except OSError:  # closed
            yield
            return
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            kept.seek(0)
            for line in kept:
                if not line.startswith(COMPLAINT):
                    os.write(stderr, line)
            os.close(stderr)


@contextlib.contextmanager
def watched_log(call: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, call(line) for each line and PROGRESS, once a percent, in the thread that loads a model."""
    capture_log()
    _watchers.append(call)
    try:
        yield
    finally:
        _watchers.remove(call)


def device_failure() -> str:
    """The first line about a device that failed since the last call, or ""."""
    failures, _failures[:] = _failures[:], []
    return next(iter(failures), "")


def last_error() -> str:
    """The last line that llama.cpp logged about an error, or ""."""
    return next((line.strip() for line in reversed(_recent) if "error" in line.lower()), "")


@contextlib.contextmanager
def keep_file_descriptors() -> Iterator[None]:
    """Stop llama_cpp from redirecting file descriptors 1 and 2 while it loads a quiet model.

    The log callback already keeps the terminal clean, and a redirection would swallow what other
    threads print meanwhile.
    """
    from importlib import import_module

    modules = [import_module(name) for name in ("llama_cpp.llama", "llama_cpp._internals")]
    originals = [private(module.__name__, "suppress_stdout_stderr") for module in modules]
    for module in modules:
        module.suppress_stdout_stderr = lambda disable=True: contextlib.nullcontext()  # type: ignore[attr-defined]  # noqa: ARG005
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.suppress_stdout_stderr = original  # type: ignore[attr-defined]

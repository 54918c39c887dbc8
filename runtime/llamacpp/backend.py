"""llama.cpp's libraries: the ggml calls that llama-cpp-python leaves out, its log, its devices,
its errors.

Knows ctypes and llama_cpp; knows nothing of models, files or prompts. Importing it loads nothing:
the libraries are opened by the first call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from pocketllava.errors import BackendError, PocketLlavaError

logger = logging.getLogger("pocketllava.llama")
logging.getLogger("pocketllava").addHandler(logging.NullHandler())  # nothing on stderr unless asked for

GPU_TYPES = (1, 2)  # enum ggml_backend_dev_type: GPU, IGPU (ggml-backend.h)
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}  # enum ggml_log_level
_recent: deque[str] = deque(maxlen=200)


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits (ggml.h)."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_F16 = 1  # enum ggml_type


@functools.lru_cache(maxsize=1)
def ggml() -> Any:
    """libggml-base, with argument types for the calls that pocketllava makes."""
    import llama_cpp
    from llama_cpp._ctypes_extensions import load_shared_library

    lib = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
    tensor, size, i64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_op_desc": (ctypes.c_char_p, [tensor]),
        "ggml_get_name": (ctypes.c_char_p, [tensor]),
        "ggml_nrows": (i64, [tensor]),
        "ggml_nbytes": (size, [tensor]),
        "ggml_backend_tensor_get": (None, [tensor, ctypes.c_void_p, size, size]),
        "ggml_backend_tensor_set": (None, [tensor, ctypes.c_void_p, size, size]),
        "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), [ctypes.c_int]),
        "ggml_validate_row_data": (ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, size]),
        "ggml_quantize_chunk": (
            size,
            [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, i64, i64, i64, ctypes.c_void_p],
        ),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


@functools.lru_cache
def to_float(kind: int) -> Callable[[ctypes.c_void_p, ctypes.c_void_p, int], object]:
    """ggml's own conversion (blocks, float32 out, number of values) of a ggml_type; releases the GIL.

    For F16 the CPU backend's vector code where its library offers it: as exact, and several times as fast.
    """
    if kind == _F16:
        with contextlib.suppress(OSError, RuntimeError, AttributeError):
            return _half_to_float()
    return _TO_FLOAT(ggml().ggml_get_type_traits(kind).contents.to_float)


def _half_to_float() -> Callable[[ctypes.c_void_p, ctypes.c_void_p, int], object]:
    import llama_cpp
    from llama_cpp._ctypes_extensions import load_shared_library

    lib = load_shared_library("ggml-cpu", Path(llama_cpp.__file__).parent / "lib")
    lib.ggml_cpu_init()  # fills the table that processors without such instructions use
    convert: Any = lib.ggml_cpu_fp16_to_fp32
    convert.restype, convert.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return cast("Callable[[ctypes.c_void_p, ctypes.c_void_p, int], object]", convert)


@functools.lru_cache(maxsize=1)
def capture_log() -> Any:
    """Send every line that llama.cpp, ggml and libmtmd log to `logging` (pocketllava.llama); once."""
    import llama_cpp
    from llama_cpp import mtmd_cpp

    def on_log(level: int, text: bytes, _user_data: Any) -> None:
        line = text.decode("utf-8", "replace").rstrip("\n")
        if line.strip():
            _recent.append(line)
            logger.log(_LEVELS.get(level, logging.DEBUG), "%s", line)

    callback = llama_cpp.llama_log_callback(on_log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_log_set(callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(callback, ctypes.c_void_p(0))
    return callback  # the cache keeps it alive as long as the process


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    """What llama.cpp logged inside the block; filled when the block ends."""
    capture_log()
    _recent.clear()
    lines: list[str] = []
    try:
        yield lines
    finally:
        lines.extend(_recent)


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn whatever llama_cpp raises inside the block into BackendError; the one place that does."""
    capture_log()
    try:
        yield
    except (PocketLlavaError, KeyboardInterrupt, GeneratorExit):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = next((line for line in reversed(_recent) if "error" in line.lower()), "")
        raise BackendError(f"{doing}: {reason}" + (f" ({hint.strip()})" if hint else "")) from error


class Interrupted(BaseException):
    """Work on the engine was ended because it was asked to; never leaves the package."""


@contextlib.contextmanager
def interruptible(context: Any, stop: Callable[[], bool] | None) -> Iterator[None]:
    """End llama_decode soon after stop() became true: at the next node on CPUs, elsewhere after the batch.

    Raises Interrupted. The interrupted batch is not in the KV cache, those before it are.
    """
    from llama_cpp import llama_cpp

    if stop is None:
        yield
        return
    callback = llama_cpp.ggml_abort_callback(lambda _data: stop())
    llama_cpp.llama_set_abort_callback(context, callback, None)
    try:
        yield
    except Exception:
        if stop():
            raise Interrupted from None
        raise
    finally:
        llama_cpp.llama_set_abort_callback(context, llama_cpp.ggml_abort_callback(), None)
    if stop():
        raise Interrupted


@contextlib.contextmanager
def keep_file_descriptors() -> Iterator[None]:
    """Stop llama_cpp from redirecting file descriptors 1 and 2 while it loads a quiet model.

    The log callback already keeps the terminal clean, and a redirection would swallow what other
    threads print meanwhile.
    """
    from llama_cpp import _internals, llama

    modules = (llama, _internals)
    before = [module.suppress_stdout_stderr for module in modules]
    for module in modules:
        module.suppress_stdout_stderr = lambda disable=True: contextlib.nullcontext()  # noqa: ARG005
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.suppress_stdout_stderr = function


def gpus() -> list[str]:
    """Names of the GPUs that this build of llama.cpp can use, such as "CUDA0 (NVIDIA RTX 4070)"."""
    import llama_cpp
    from llama_cpp import _ggml

    capture_log()
    if not llama_cpp.llama_supports_gpu_offload():
        return []
    lib = _ggml.libggml
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype, lib.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    base = ggml()
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(base, name).restype, getattr(base, name).argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    devices = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
    return [
        f"{base.ggml_backend_dev_name(d).decode()} ({base.ggml_backend_dev_description(d).decode()})"
        for d in devices
        if base.ggml_backend_dev_type(d) in GPU_TYPES
    ]


@functools.lru_cache(maxsize=1)
def cores() -> int:
    """Physical cores that this process may use: what ggml's spinning threads want, at least 1.

    More threads than cores cost up to a factor of 100, so hyper-threads are not counted.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        siblings = {_siblings(cpu) for cpu in allowed}
        return max(1, len(siblings))
    if sys.platform == "darwin":
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            found = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
            if found.returncode == 0 and found.stdout.strip().isdigit():
                return max(1, int(found.stdout))
    return max(1, (os.cpu_count() or 2) // 2)


def _siblings(cpu: int) -> str:
    """The hyper-threads that share a core with this one, as Linux writes them ("0,8")."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
    except OSError:
        return str(cpu)

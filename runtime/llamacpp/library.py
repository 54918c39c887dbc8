"""libggml's functions that llama-cpp-python leaves out, and nodes of its graphs.

Knows ctypes and ggml.h; nothing of models, files or prompts. Importing it loads nothing: the libraries are
opened by the first call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError
from pocketllava.llamacpp.private import private
from pocketllava.models.gguf_header import F16


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


class InitParams(ctypes.Structure):
    """struct ggml_init_params (ggml.h)."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class DeviceCaps(ctypes.Structure):
    """struct ggml_backend_dev_caps (ggml-backend.h), with room for more."""

    _fields_ = [
        ("asynchronous", ctypes.c_bool),
        ("host_buffer", ctypes.c_bool),
        ("buffer_from_host_ptr", ctypes.c_bool),
        ("events", ctypes.c_bool),
        ("mmap_support", ctypes.c_bool),
        ("more", ctypes.c_bool * 59),
    ]


class DeviceProps(ctypes.Structure):
    """struct ggml_backend_dev_props (ggml-backend.h)."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", DeviceCaps),
    ]


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def give_back_memory() -> None:
    """Give what was freed back to the system: glibc keeps it in lists, 50 MB after each of a small model's loads."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library; Windows
        ctypes.CDLL(None).malloc_trim(0)


def _open(name: str) -> Any:
    import llama_cpp

    load = private("llama_cpp._ctypes_extensions", "load_shared_library")
    return load(name, Path(llama_cpp.__file__).parent / "lib")


@functools.lru_cache(maxsize=1)
def ggml() -> Any:
    """libggml-base, with argument types for the calls that pocketllava makes."""
    lib = _open("ggml-base")
    tensor = pointer = ctypes.c_void_p
    size, i64 = ctypes.c_size_t, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_op_desc": (ctypes.c_char_p, [tensor]),
        "ggml_get_name": (ctypes.c_char_p, [tensor]),
        "ggml_nrows": (i64, [tensor]),
        "ggml_nbytes": (size, [tensor]),
        "ggml_backend_dev_get_props": (None, [pointer, pointer]),
        "ggml_backend_dev_backend_reg": (pointer, [pointer]),
        "ggml_backend_reg_name": (ctypes.c_char_p, [pointer]),
        "ggml_backend_dev_buffer_type": (pointer, [pointer]),
        "ggml_backend_buft_get_max_size": (size, [pointer]),
        "ggml_backend_buft_alloc_buffer": (pointer, [pointer, size]),
        "ggml_backend_buffer_free": (None, [pointer]),
        "ggml_backend_dev_init": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_free": (None, [pointer]),
        "ggml_backend_alloc_ctx_tensors": (pointer, [pointer, pointer]),
        "ggml_backend_graph_compute": (ctypes.c_int, [pointer, pointer]),
        "ggml_init": (pointer, [InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (tensor, [pointer, ctypes.c_int, i64, i64]),
        "ggml_mul_mat": (tensor, [pointer, tensor, tensor]),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, tensor]),
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
    if kind == F16:
        with contextlib.suppress(OSError, RuntimeError, AttributeError):
            return _half_to_float()
    return _TO_FLOAT(ggml().ggml_get_type_traits(kind).contents.to_float)


def _half_to_float() -> Callable[[ctypes.c_void_p, ctypes.c_void_p, int], object]:
    lib = _open("ggml-cpu")
    lib.ggml_cpu_init()  # fills the table that processors without such instructions use
    convert: Any = lib.ggml_cpu_fp16_to_fp32
    convert.restype, convert.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return cast("Callable[[ctypes.c_void_p, ctypes.c_void_p, int], object]", convert)


@dataclass(frozen=True)
class Node:
    """A tensor of a graph that the scheduler computes, by its address."""

    address: int

    @property
    def operation(self) -> bytes:
        """ggml's name of what computes it, such as b"CONCAT"."""
        return cast("bytes", ggml().ggml_op_desc(self.address))

    @property
    def name(self) -> bytes:
        """The name that llama.cpp gave it, such as b"norm-0"."""
        return cast("bytes", ggml().ggml_get_name(self.address))

    @property
    def n_rows(self) -> int:
        """Rows, all outer dimensions counted."""
        return int(ggml().ggml_nrows(self.address))

    @property
    def n_bytes(self) -> int:
        """Bytes of its values."""
        return int(ggml().ggml_nbytes(self.address))

    def rows(self, width: int) -> npt.NDArray[np.float32]:
        """Its values, (n_rows, width) float32, copied from whatever memory they are in.

        Raises BackendError for a tensor of another size.
        """
        values = np.empty((self.n_rows, width), np.float32)
        if self.n_bytes != values.nbytes:
            raise BackendError(
                f"ggml node {self.name.decode()!r}: {self.n_bytes} bytes, expected {values.nbytes}"
            )
        ggml().ggml_backend_tensor_get(self.address, values.ctypes.data, 0, values.nbytes)
        return values

    def write(self, values: npt.NDArray[np.float32]) -> None:
        """Replace its values by as many others."""
        values = np.ascontiguousarray(values, np.float32)
        ggml().ggml_backend_tensor_set(self.address, values.ctypes.data, 0, values.nbytes)

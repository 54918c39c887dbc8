"""The layout of ggml's struct ggml_tensor (ggml.h), which has no accessor for a node's sources.

Before the first use every field is compared with what ggml's own functions say of tensors made for it, so
that a library with another layout is an error, not garbage. Knows ctypes and ggml; no models.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from pocketllava.errors import BackendError
from pocketllava.llamacpp.library import Node, ggml
from pocketllava.models.gguf_header import F16, F32

MAX_DIMS, MAX_OP_PARAMS_BYTES, MAX_SRC, MAX_NAME = 4, 64, 10, 64  # ggml.h
OBJECT_BYTES = 32  # struct ggml_object, which ggml_tensor_overhead counts in


class Tensor(ctypes.Structure):
    """struct ggml_tensor."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * MAX_DIMS),
        ("nb", ctypes.c_size_t * MAX_DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * (MAX_OP_PARAMS_BYTES // 4)),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * MAX_SRC),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * MAX_NAME),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


@dataclass(frozen=True)
class Product:
    """A matrix product: the weight's name, and the input, whose rows have n_columns values."""

    weight: str
    input: Node
    n_columns: int
    contiguous_f32: bool


def product(node: Node) -> Product | None:
    """What a node multiplies, or None for another operation. Raises BackendError as mul_mat_op does."""
    tensor = tensor_at(node.address)
    if tensor.op != mul_mat_op():
        return None
    rows = tensor_at(tensor.src[1])
    contiguous = rows.type == F32 and rows.nb[1] == rows.ne[0] * ctypes.sizeof(ctypes.c_float)
    weight = tensor_at(tensor.src[0]).name.decode("utf-8", "replace")
    return Product(weight, Node(tensor.src[1]), rows.ne[0], contiguous)


def tensor_at(address: int) -> Tensor:
    """The tensor at an address that ggml gave out."""
    return Tensor.from_address(address)


@functools.lru_cache(maxsize=1)
def mul_mat_op() -> int:
    """The number of GGML_OP_MUL_MAT in this library, from a product of two tensors whose every field is checked.

    Raises BackendError if the layout is another one.
    """
    lib = _library()
    context = lib.ggml_init(_InitParams(1 << 16, None, True))
    try:
        weight = lib.ggml_new_tensor_2d(context, F16, 96, 7)
        rows = lib.ggml_new_tensor_3d(context, F32, 96, 5, 3)
        lib.ggml_set_name(weight, b"blk.0.weight")
        lib.ggml_set_name(rows, b"rows")
        product = lib.ggml_mul_mat(context, weight, rows)
        view = lib.ggml_transpose(context, rows)
        op = int(tensor_at(product).op)
        same = (
            ctypes.sizeof(Tensor) + OBJECT_BYTES == lib.ggml_tensor_overhead()
            and all(_agrees(lib, address) for address in (weight, rows, product, view))
            and list(tensor_at(product).src[:3]) == [weight, rows, None]
            and (tensor_at(view).view_src, tensor_at(weight).type, tensor_at(rows).type) == (rows, F16, F32)
            and list(tensor_at(rows).ne) == [96, 5, 3, 1]
            and list(tensor_at(view).nb[:2]) == [96 * 4, 4]
            and lib.ggml_op_name(op) == lib.ggml_op_desc(product) == b"MUL_MAT"
        )
    finally:
        lib.ggml_free(context)
    if not same:
        raise BackendError(
            "ggml: this llama-cpp-python lays tensors out in another way than 0.3.36 does; upgrade pocketllava, or"
            " install llama-cpp-python 0.3.36"
        )
    return op


def _agrees(lib: Any, address: int) -> bool:
    """Whether name, sizes and data of one tensor are what ggml's accessors say."""
    t = tensor_at(address)
    elements = t.ne[0] * t.ne[1] * t.ne[2] * t.ne[3]
    return bool(
        t.name == lib.ggml_get_name(address)
        and t.ne[1] * t.ne[2] * t.ne[3] == lib.ggml_nrows(address)
        and elements * lib.ggml_element_size(address) == lib.ggml_nbytes(address)
        and t.data == lib.ggml_get_data(address)
        and sum(1 for n, ne in enumerate(t.ne) if n < lib.ggml_n_dims(address) or ne == 1) == MAX_DIMS
    )


def _library() -> Any:
    lib, pointer, i64 = ggml(), ctypes.c_void_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, i64, i64]),
        "ggml_new_tensor_3d": (pointer, [pointer, ctypes.c_int, i64, i64, i64]),
        "ggml_set_name": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_mul_mat": (pointer, [pointer, pointer, pointer]),
        "ggml_transpose": (pointer, [pointer, pointer]),
        "ggml_tensor_overhead": (ctypes.c_size_t, []),
        "ggml_element_size": (ctypes.c_size_t, [pointer]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_n_dims": (ctypes.c_int, [pointer]),
        "ggml_op_name": (ctypes.c_char_p, [ctypes.c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = lib[name]  # an object of its own: other users of the library keep their types
        function.restype, function.argtypes = result, arguments
        setattr(_Own, name, function)
    for name in ("ggml_get_name", "ggml_nrows", "ggml_nbytes", "ggml_op_desc"):
        setattr(_Own, name, getattr(lib, name))
    return _Own


class _Own:
    """Functions of libggml-base with the types that they have here."""

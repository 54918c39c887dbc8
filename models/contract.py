"""The parts of both GGUF contracts: what one key must be, and how names and tensor data must lie in the file.

Knows headers and GGUF's numbers for types; neither which keys a text model has (text_contract.py) nor which an mmproj
has (mmproj_contract.py).
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pocketllava.errors import BundleError
from pocketllava.models.gguf_header import ALIGNMENT, Header

U16, U32, I32, FLOAT, BOOL, TEXT = 2, 4, 5, 6, 7, 8  # enum gguf_type
TYPE_NAMES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64", "int64",
    "float64",
)  # fmt: skip
ExpectedTensor = tuple[
    str, tuple[int, ...], tuple[int, ...], bool
]  # name, shape (rows first), types, required
MIN_ALIGNMENT = 32  # ggml-cpu's TENSOR_ALIGNMENT
MAX_LAYERS = 512  # llama-hparams.h, LLAMA_MAX_LAYERS; no vision tower has more


@dataclass(frozen=True)
class Rule:
    """What llama.cpp demands of one key: its GGUF type, and what must hold of its value."""

    kind: int
    expected: str
    holds: Callable[[Any], bool] = lambda _value: True
    required: bool = False


def flag() -> Rule:
    """A key that is true or false."""
    return Rule(BOOL, "true or false")


def only(kind: int, value: Any) -> Rule:
    """A key that may say nothing else."""
    return Rule(kind, f"{value!r} or no such key", lambda actual: bool(actual == value))


# Of every GGUF file. That the alignment is a power of two is the container's affair; mapped tensors must lie where
# ggml's vector code can load.
GENERAL: dict[str, Rule] = {
    "general.name": Rule(TEXT, "text"),
    "general.alignment": Rule(U32, f"{MIN_ALIGNMENT} or a larger power of two", lambda n: n >= MIN_ALIGNMENT),
    "general.file_type": Rule(U32, "a number"),
}


def check_key(header: Header, name: str, rule: Rule) -> None:
    """Raises BundleError for a key of another type or value, and for one that is missing and required."""
    if name not in header.keys:
        if rule.required:
            raise fault(header, f"key {name} is missing", rule.expected)
        return
    value, kind = header.keys[name], header.key_types[name]
    if kind != rule.kind or not rule.holds(value):
        raise fault(
            header,
            f"key {name} is {shown(value)} ({TYPE_NAMES[kind]})",
            f"{rule.expected} ({TYPE_NAMES[rule.kind]})",
        )


def check_names(header: Header) -> None:
    """C takes a name with a zero byte for what stands before the byte."""
    for name in header.keys:
        if not name or "\0" in name:
            raise fault(header, f"a key is named {shown(name)}", "a name without zero bytes")


def check_layout(header: Header) -> None:
    """gguf.cpp takes tensors' data for one after the other, with nothing between them but padding."""
    alignment, end = int(header.keys.get("general.alignment", ALIGNMENT)), 0
    for tensor in header.tensors.values():
        if tensor.offset != end:
            raise fault(header, f"tensor {tensor.name!r} lies at {tensor.offset}", f"{end}")
        end += -(-tensor.n_bytes // alignment) * alignment


def check_tensors(header: Header, expected: Iterable[ExpectedTensor], kind: str) -> None:
    """Stops at the first fault, so that a false block count costs no more than the file holds tensors.

    kind: what the file should be, such as "32 blocks of `llama`".
    """
    known = set()
    for name, shape, types, required in expected:
        tensor = header.tensors.get(name)
        if tensor is None:
            if required:
                raise fault(header, f"tensor {name!r} is missing", kind)
            continue
        known.add(name)
        if tensor.shape != shape or tensor.type not in types:
            raise fault(
                header,
                f"tensor {name!r} has shape {list(tensor.shape)} and type {tensor.type}",
                f"{list(shape)} and {f'type {types[0]}' if len(types) == 1 else f'one of {list(types)}'}",
            )
    for name in header.tensors:
        if name not in known:
            raise fault(header, f"tensor {shown(name)} is unexpected", kind)


def shown(value: object) -> str:
    """A value, cut short."""
    return reprlib.repr(value)


def fault(header: Header, value: str, expected: str) -> BundleError:
    """The error for one fault of a file."""
    return BundleError(f"{header.path}: {value}, expected {expected}; convert or download it again")

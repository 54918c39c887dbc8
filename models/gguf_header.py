"""The one reader of GGUF headers: keys and tensors of a file, without its tensor data.

Everything is checked first, because llama.cpp aborts the process on much of what can be wrong. Knows the container
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and ggml's numbers for types; no model.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pocketllava.errors import BundleError
from pocketllava.models.files import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE = "general.architecture"
ALIGNMENT = 32  # of tensor data, unless general.alignment says otherwise
F32, F16, BF16 = 0, 1, 30  # enum ggml_type
MAX_ITEMS = 1 << 24  # keys, tensors or array elements: far above any model, far below memory
MAX_STRING_BYTES = 1 << 26
U32, I32, FLOAT, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # enum gguf_type
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `shape` is in numpy's order (rows first); `offset` counts from the data's start."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Part:
    """A GGUF file that is stored as it is inside another: where it begins, its bytes, and its name there."""

    path: Path
    start: int
    n_bytes: int
    name: str


@dataclass(frozen=True)
class Header:
    """Keys (with their GGUF value types, and the types of arrays' items) and tensors of one file.

    not_utf8: keys whose name or text holds bytes that are no UTF-8, U+FFFD in their place here. part: the place inside
    the file under `path`, which data_start counts from the beginning of; file_bytes is the part's.
    """

    path: Path
    keys: dict[str, Any]
    key_types: dict[str, int]
    tensors: dict[str, TensorInfo]
    data_start: int
    file_bytes: int
    item_types: dict[str, int] = field(default_factory=dict)
    not_utf8: frozenset[str] = frozenset()
    part: Part | None = None

    @classmethod
    def read(cls, place: Path | Part) -> Header:
        """Read and check the header. Raises BundleError naming the file and what is wrong with it."""
        try:
            with _opened(place) as reader:
                return reader.header()
        except OSError as error:
            path = place.path if isinstance(place, Part) else place
            raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error

    @property
    def place(self) -> Path | Part:
        """Where it was read."""
        return self.part or self.path

    @property
    def name(self) -> str:
        """The file's name, inside an archive the one that it has there."""
        return self.part.name if self.part else self.path.name

    @property
    def start(self) -> int:
        """Where the GGUF file begins in the file under `path`."""
        return self.part.start if self.part else 0

    @property
    def header_bytes(self) -> int:
        """Bytes before the tensor data."""
        return self.data_start - self.start


def architecture(place: Path | Part) -> str | None:
    """A file's general.architecture, without reading what comes after it; None for what is no GGUF file."""
    try:
        with _opened(place) as reader:
            return reader.architecture()
    except (OSError, BundleError):
        return None


@contextmanager
def _opened(place: Path | Part) -> Iterator[_Reader]:
    """Raises OSError; BundleError for a part that its file does not hold."""
    part = place if isinstance(place, Part) else None
    path = part.path if part else place
    assert isinstance(path, Path)
    n_bytes = path.stat().st_size
    with open_regular(path) as file:
        if part is not None:
            if part.start + part.n_bytes > n_bytes:
                raise BundleError(
                    f"{path}: found {n_bytes} bytes, expected {part.start + part.n_bytes}; download it again"
                )
            file.seek(part.start)
        yield _Reader(path, file, part.n_bytes if part else n_bytes, part)


class _Reader:
    """A cursor over the file, or a part of it, that refuses to read past its end."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int, part: Part | None) -> None:
        self.path, self.file, self.file_bytes, self.part = path, file, file_bytes, part
        self.at = 0  # counted here: asking a file where it is takes longer than reading a token from it
        self.item_type = 0  # of the array read last
        self.replaced = False  # whether a text was no UTF-8

    def fail(self, fault: str) -> BundleError:
        return BundleError(f"{self.path}: not a whole GGUF file: {fault}; convert or download it again")

    def take(self, n: int) -> bytes:
        self.at += n
        if self.at > self.file_bytes:
            raise self.fail(f"ends after {self.file_bytes} bytes, in the middle of its header")
        return self.file.read(n)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, items: str) -> int:
        n = int(self.scalar("Q"))
        if n > MAX_ITEMS:
            raise self.fail(f"{n} {items}")
        return n

    def string(self) -> str:
        n = int.from_bytes(self.take(8), "little")
        if n > MAX_STRING_BYTES:
            raise self.fail(f"a text of {n} bytes")
        raw = self.take(n)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.replaced = True
            return raw.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array()
        raise self.fail(f"value type {kind}")

    def array(self) -> list[Any]:
        kind, n = int(self.scalar("I")), self.count("array elements")
        self.item_type = kind
        if kind in SCALARS:
            code = f"<{n}{SCALARS[kind]}"
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        if kind == STRING:
            return [self.string() for _ in range(n)]
        raise self.fail(f"an array of value type {kind}")

    def counts(self) -> tuple[int, int]:
        """Tensors and keys, as the file's first bytes say."""
        if self.file_bytes < 24 or self.take(4) != MAGIC:
            raise self.fail(f"{self.file_bytes} bytes that do not begin with {MAGIC.decode()}")
        if (version := self.scalar("I")) not in VERSIONS:
            raise self.fail(f"version {version}, expected {' or '.join(map(str, VERSIONS))}")
        return self.count("tensors"), self.count("keys")

    def architecture(self) -> str | None:
        _, n_keys = self.counts()
        for _ in range(n_keys):
            name, kind = self.string(), int(self.scalar("I"))
            value = self.value(kind)
            if name == ARCHITECTURE:
                return value if kind == STRING else None
        return None

    def header(self) -> Header:
        n_tensors, n_keys = self.counts()
        keys: dict[str, Any] = {}
        key_types: dict[str, int] = {}
        item_types: dict[str, int] = {}
        not_utf8 = set()
        for _ in range(n_keys):
            self.replaced = False
            name, kind = self.string(), int(self.scalar("I"))
            if name in keys:
                raise self.fail(f"key {name!r} twice")
            keys[name], key_types[name] = self.value(kind), kind
            if kind == ARRAY:
                item_types[name] = self.item_type
            if self.replaced:
                not_utf8.add(name)
        infos = [self.tensor() for _ in range(n_tensors)]
        alignment = keys.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {info.name: info for info in infos}
        if len(tensors) != len(infos):
            raise self.fail("two tensors of one name")
        for info in infos:
            self.check(info, start, alignment)
        return Header(
            self.path,
            keys,
            key_types,
            tensors,
            start + (self.part.start if self.part else 0),
            self.file_bytes,
            item_types,
            frozenset(not_utf8),
            self.part,
        )

    def tensor(self) -> TensorInfo:
        name, n_dims = self.string(), int(self.scalar("I"))
        if not 1 <= n_dims <= 4:
            raise self.fail(f"tensor {name!r} has {n_dims} dimensions")
        shape = tuple(int(self.scalar("Q")) for _ in range(n_dims))[::-1]
        kind, offset = int(self.scalar("I")), int(self.scalar("Q"))
        return TensorInfo(name, shape, kind, offset, self.size(name, shape, kind))

    def size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in [int(t) for t in GGML_QUANT_SIZES]:
            raise self.fail(f"tensor {name!r} has the unknown type {kind}")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        values = 1
        for n in shape:
            values *= n
        if not 0 < values < 1 << 48 or shape[-1] % block:
            raise self.fail(f"tensor {name!r} has the shape {shape}")
        return values // int(block) * int(block_bytes)

    def check(self, info: TensorInfo, start: int, alignment: int) -> None:
        if info.offset % alignment:
            raise self.fail(f"tensor {info.name!r} lies at {info.offset}, not a multiple of {alignment}")
        if start + info.offset + info.n_bytes > self.file_bytes:
            raise self.fail(
                f"{self.file_bytes} bytes, but tensor {info.name!r} ends at"
                f" {start + info.offset + info.n_bytes}"
            )

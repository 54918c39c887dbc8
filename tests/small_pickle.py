"""Small .bin files as torch.save writes them: a zip of stored entries and a pickle, spelled out by hand."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

Tensor = tuple[str, str, tuple[int, ...], bytes]  # name, dtype, shape, data
STORAGE = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "I64": "LongStorage"}
WIDTH = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
FOLDER = "archive"


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """BININT, or LONG1."""
    return b"J" + struct.pack("<i", value) if abs(value) < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def numbers(values: Sequence[int]) -> bytes:
    """A tuple."""
    return b"(" + b"".join(map(number, values)) + b"t"


def strides(shape: Sequence[int]) -> list[int]:
    """Of a contiguous tensor."""
    out: list[int] = []
    n = 1
    for side in reversed(shape):
        out, n = [n, *out], n * side
    return out


def storage(key: str, dtype: str, n: int) -> bytes:
    """A persistent id."""
    return (
        b"("
        + text("storage")
        + f"ctorch\n{STORAGE[dtype]}\n".encode()
        + text(key)
        + text("cpu")
        + number(n)
        + b"tQ"
    )


def rebuild(store: bytes, shape: Sequence[int], step: Sequence[int], offset: int = 0) -> bytes:
    """_rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())."""
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + store
        + number(offset)
        + numbers(shape)
        + numbers(step)
        + hooks
        + b"tR"
    )


def state_dict(entries: Sequence[tuple[str, bytes]]) -> bytes:
    """An OrderedDict with `_metadata`, as Module.state_dict gives it."""
    items = b"".join(text(name) + value for name, value in entries)
    metadata = b"}(" + text("_metadata") + b"}" + text("") + b"}" + text("version") + number(1) + b"ssub"
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u" + metadata + b"."


def archive(
    path: Path, pickled: bytes, data: dict[str, bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """The zip file: data by storage key."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{FOLDER}/data.pkl", pickled)
        file.writestr(f"{FOLDER}/byteorder", "little")
        for key, content in data.items():
            file.writestr(f"{FOLDER}/data/{key}", content)
        file.writestr(f"{FOLDER}/version", "3\n")
    return path


def write_bin(path: Path, tensors: Sequence[Tensor]) -> Path:
    """Tensors, each in a storage of its own."""
    entries, data = [], {}
    for key, (name, dtype, shape, content) in enumerate(tensors):
        store = storage(str(key), dtype, len(content) // WIDTH[dtype])
        entries.append((name, rebuild(store, shape, strides(shape))))
        data[str(key)] = content
    return archive(path, state_dict(entries), data)


class Runs:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """As every such trick begins."""
        import os

        return os.system, (self.command,)


def malicious(command: str, protocol: int = 2) -> bytes:
    """A pickle that runs a command if anything unpickles it."""
    return pickle.dumps({"weight": Runs(command)}, protocol)

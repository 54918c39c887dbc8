"""One .bin file of torch.save -> the offsets of its tensors. Reads the zip directory and the pickle, no tensor data.

Knows torch's zip format (since 1.6): uncompressed entries ARCHIVE/data.pkl and ARCHIVE/data/KEY, one for each
storage. torch_pickle.py reads the pickle; nothing in it runs.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from pocketllava.convert.read.sources import LFS, WIDTHS, SourceTensor, lfs_pointer, opened, size_bytes
from pocketllava.convert.read.torch_pickle import View, read_state_dict
from pocketllava.errors import ConvertError

PICKLE, BYTE_ORDER = "data.pkl", "byteorder"
LOCAL = struct.Struct("<4s5H3I2H")  # a zip entry's local header, APPNOTE 4.3.7
LOCAL_SIGNATURE, ZIP = b"PK\x03\x04", b"PK"
ENCRYPTED = 1
MAX_PICKLE_BYTES = 16 << 20  # a 13B model's takes 0.1 MB
MAX_ENTRIES = 1 << 17
MAX_DIRECTORY_BYTES = 8 << 20  # of the zip archive; a 13B model's takes 0.1 MB
TRUST = "from torch import load, save; save(load(FILE, weights_only=True), FILE)"


def read_pickled(path: Path) -> list[SourceTensor]:
    """The tensors of one .bin file: every entry uncompressed, inside the file, of the right size.

    Raises ConvertError for everything else: another format, another pickle, compressed or overlapping
    entries, tensors whose rows are not contiguous.
    """
    with opened(path) as file:
        _check_format(file, path)
        try:
            with _Bounded(path) as bounded, zipfile.ZipFile(bounded) as archive:
                entries = _entries(archive.infolist(), path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
            raise ConvertError(
                f"{path}: not a whole zip archive ({error}); the file is truncated or damaged: download it again"
            ) from error
        located = _Entries(file, path, entries)
        views = read_state_dict(located.read(PICKLE, MAX_PICKLE_BYTES), str(path))
        if BYTE_ORDER in entries and (order := located.read(BYTE_ORDER, 16)) != b"little":
            raise ConvertError(
                f"{path}: byte order {order!r}, expected b'little'; save it on another machine"
            )
        tensors = [_tensor(name, view, located) for name, view in views.items()]
        located.check_overlaps()
        return tensors


class _Bounded(io.FileIO):
    """A file that returns no more at once than a directory may take: zipfile reads all of it before checking."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = MAX_DIRECTORY_BYTES  # zipfile's read of the file's last 64 kB
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes, expected at most {MAX_DIRECTORY_BYTES}")
        return super().read(size) or b""


def _check_format(file: BinaryIO, path: Path) -> None:
    head = file.read(len(LFS))
    if head == LFS:
        raise lfs_pointer(path)
    if not head.startswith(ZIP):
        state = (
            "torch's format from before 1.6, or another pickle" if head[:1] == b"\x80" else "no zip archive"
        )
        raise ConvertError(
            f"{path}: {state}, expected the zip format of torch.save; nothing of it was run: get safetensors, or"
            f" if you trust the file, save it again with torch ({TRUST})"
        )


def _entries(infos: Iterable[zipfile.ZipInfo], path: Path) -> dict[str, zipfile.ZipInfo]:
    """Entries by name, without the archive's folder, which data.pkl's name begins with."""
    entries = list(infos)
    pickles = [
        e.filename for e in entries if e.filename.count("/") == 1 and e.filename.endswith("/" + PICKLE)
    ]
    folders = [name.removesuffix(PICKLE) for name in pickles]
    if len(folders) != 1:
        raise ConvertError(
            f"{path}: a zip archive with {len(folders)} data.pkl, expected one, as torch.save writes"
        )
    inside = [e for e in entries if e.filename.startswith(folders[0])]
    named = {e.filename.removeprefix(folders[0]): e for e in inside}
    if len(named) != len(inside) or len(named) > MAX_ENTRIES:
        raise ConvertError(f"{path}: {len(inside)} entries of {len(named)} names; download it again")
    return named


class _Entries:
    """Offsets of entries' bytes in the file: local headers are read and checked once."""

    def __init__(self, file: BinaryIO, path: Path, entries: dict[str, zipfile.ZipInfo]) -> None:
        self._file, self.path, self._entries = file, path, entries
        self._size = path.stat().st_size
        self._located: dict[str, tuple[int, int]] = {}

    def find(self, name: str) -> tuple[int, int]:
        """(offset, bytes) of an entry. Raises ConvertError."""
        if name not in self._located:
            if name not in self._entries:
                raise ConvertError(
                    f"{self.path}: no entry {name[:80]!r}, which its pickle names; download it again"
                )
            self._located[name] = self._locate(name, self._entries[name])
        return self._located[name]

    def _locate(self, name: str, entry: zipfile.ZipInfo) -> tuple[int, int]:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
            raise ConvertError(
                f"{self.path}: entry {name!r} is compressed or encrypted, expected a stored one, as torch.save writes"
            )
        if entry.compress_size != entry.file_size or entry.header_offset < 0:
            raise ConvertError(f"{self.path}: entry {name!r} has two sizes; download it again")
        self._file.seek(entry.header_offset)
        head = self._file.read(LOCAL.size)
        if len(head) < LOCAL.size or not head.startswith(LOCAL_SIGNATURE):
            raise ConvertError(
                f"{self.path}: entry {name!r} does not lie where the directory says; download it again"
            )
        *_, name_bytes, extra_bytes = LOCAL.unpack(head)
        offset = entry.header_offset + LOCAL.size + int(name_bytes) + int(extra_bytes)
        if offset + entry.file_size > self._size:
            raise ConvertError(
                f"{self.path}: {self._size} bytes, but entry {name!r} ends at {offset + entry.file_size}; the file is"
                " truncated: download it again"
            )
        return offset, entry.file_size

    def read(self, name: str, limit: int) -> bytes:
        """A small entry's bytes."""
        offset, n_bytes = self.find(name)
        if n_bytes > limit:
            raise ConvertError(f"{self.path}: entry {name!r} takes {n_bytes} bytes, expected at most {limit}")
        self._file.seek(offset)
        return self._file.read(n_bytes)

    def check_overlaps(self) -> None:
        """Raise ConvertError if two entries share bytes."""
        end = 0
        for name, (offset, n_bytes) in sorted(self._located.items(), key=lambda item: item[1]):
            if offset < end:
                raise ConvertError(
                    f"{self.path}: entry {name!r} overlaps the one before it; download it again"
                )
            end = offset + n_bytes


def _tensor(name: str, view: View, located: _Entries) -> SourceTensor:
    """A view as a range of bytes; tensors that share a storage (tied weights) share its bytes."""
    storage = view.storage
    offset, n_stored = located.find(f"data/{storage.key}")
    width = WIDTHS[storage.dtype]
    if n_stored != storage.n * width:
        raise ConvertError(
            f"{located.path}: the storage of tensor {name!r} takes {n_stored} bytes, expected {storage.n * width} for"
            f" {storage.n} values of {storage.dtype}; download it again"
        )
    _check_contiguous(name, view, located.path)
    n_bytes = size_bytes(storage.dtype, view.shape)
    if view.offset * width + n_bytes > n_stored:
        raise ConvertError(f"{located.path}: tensor {name!r} goes beyond its storage; download it again")
    return SourceTensor(name, located.path, offset + view.offset * width, n_bytes, storage.dtype, view.shape)


def _check_contiguous(name: str, view: View, path: Path) -> None:
    """Raise ConvertError unless the tensor is contiguous."""
    expected = 1
    for n, stride in reversed(list(zip(view.shape, view.strides, strict=True))):
        if n != 1 and stride != expected and 0 not in view.shape:
            raise ConvertError(
                f"{path}: tensor {name!r} of shape {list(view.shape)} has strides {list(view.strides)}, expected"
                " contiguous rows; save it with .contiguous()"
            )
        expected *= n

"""A llamafile -> the GGUF files in it: where they lie, so that nothing is extracted; or, where they cannot be used
there, extracted into the cache folder.

A llamafile is a program with a ZIP archive behind it, whose GGUF files are stored as they are. libllama maps one from
the middle of a file, if its tensors are aligned; libmtmd takes whole files only. Knows the archive; what the files are
is foreign.py's affair.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from filelock import FileLock

from pocketllava.errors import BundleError, DiskFull
from pocketllava.models.contract import MIN_ALIGNMENT
from pocketllava.models.files import atomic_write, cache_folder, open_regular
from pocketllava.models.gguf_header import Part

logger = logging.getLogger("pocketllava")
GGUF_MAGIC = b"GGUF"
MAX_FILES = 16  # a llamafile has two
CHUNK_BYTES = 1 << 22
SPARE_BYTES = 64 << 20
LOCAL_HEADER_BYTES = 30  # of a ZIP entry, in front of its name and its extra field
IN_PLACE = os.name == "posix"  # elsewhere libllama's FILE is another C library's than Python's


def is_llamafile(path: Path) -> bool:
    """Whether a file has a ZIP archive behind it, and is no GGUF file."""
    try:
        with open_regular(path) as file:
            return file.read(4) != GGUF_MAGIC and zipfile.is_zipfile(file)
    except OSError:
        return False


def gguf_parts(path: Path) -> Sequence[Path | Part]:
    """A llamafile's GGUF files where they lie, or extracted where that cannot be. Raises BundleError, DiskFull."""
    with _faults(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        parts = [_part(path, file, entry) for entry in _gguf_entries(path, archive)]
    if IN_PLACE and all(part.start % MIN_ALIGNMENT == 0 for part in parts):
        return parts
    return sorted(extracted(path).glob("*.gguf"))


def is_extracted(path: Path) -> bool:
    """Whether a file was extracted from a llamafile."""
    return _extracts() in path.parents


def extracted(path: Path) -> Path:
    """The folder with its GGUF files, which are extracted with the first use. Raises BundleError, DiskFull."""
    with _faults(path), open_regular(path) as file, zipfile.ZipFile(file) as archive:
        entries = _gguf_entries(path, archive)
        listing = [(e.filename, e.file_size, e.CRC, e.header_offset) for e in entries]
        key = hashlib.sha256(repr((path.stat().st_size, listing)).encode()).hexdigest()[:16]
        folder = _extracts() / key
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{key}.lock")):
            missing = [entry for entry in entries if not (folder / _name(entry)).is_file()]
            _check_disk(path, folder, sum(entry.file_size for entry in missing))
            for entry in missing:
                with (
                    atomic_write(folder / _name(entry)) as part,
                    archive.open(entry) as source,
                    part.open("wb") as target,
                ):
                    shutil.copyfileobj(source, target, CHUNK_BYTES)  # zipfile compares the CRC at the end
                    target.flush()
    return folder


def copy_of(place: Path | Part, target: Path) -> None:
    """Write a file, or the part of one, to `target`. Raises OSError."""
    if isinstance(place, Path):
        shutil.copyfile(place, target)
        return
    with open_regular(place.path) as source, target.open("wb") as file:
        source.seek(place.start)
        left = place.n_bytes
        while block := source.read(min(CHUNK_BYTES, left)):
            file.write(block)
            left -= len(block)


def _extracts() -> Path:
    return cache_folder() / "llamafiles"


def _part(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> Part:
    """Where an entry's data begin is said by its local header, whose extra field may be longer than the list's."""
    file.seek(entry.header_offset + LOCAL_HEADER_BYTES - 4)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    start = entry.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    return Part(path, start, entry.file_size, _name(entry))


def _gguf_entries(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Raises BundleError for an archive without any, or with compressed ones, whose sizes nothing bounds."""
    entries = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".gguf")]
    names = {_name(entry) for entry in entries}
    if not 0 < len(entries) <= MAX_FILES or len(names) < len(entries):
        raise BundleError(f"{path}: a ZIP archive with {len(entries)} GGUF files, expected a llamafile's two")
    size = path.stat().st_size
    for entry in entries:
        stored = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
        if not stored or entry.file_size != entry.compress_size or entry.file_size > size:
            raise BundleError(f"{path}: {_name(entry)} is not stored as it is, as a llamafile's files are")
    return entries


def _name(entry: zipfile.ZipInfo) -> str:
    """Its last part alone, so that no entry leaves the folder."""
    return PurePosixPath(entry.filename.replace("\\", "/")).name.replace(":", "-")


def _check_disk(path: Path, folder: Path, needed: int) -> None:
    if not needed:
        return
    free = shutil.disk_usage(folder).free
    if needed + SPARE_BYTES > free:
        raise DiskFull(
            f"{folder}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for those in {path.name}; make room",
            needed,
            free,
        )
    logger.warning(
        "%s: its files are extracted once, which takes %.2f GB in %s", path.name, needed / 1e9, folder
    )


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        OSError,
        zipfile.BadZipFile,
        ValueError,
        NotImplementedError,
        RuntimeError,
        EOFError,
        struct.error,
    ) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{path}: its files cannot be extracted ({reason}); download it again") from error

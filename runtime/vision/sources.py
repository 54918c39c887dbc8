"""Where an image comes from: a path, bytes, a file object, a data URI, a PIL image or an array, known by its content.

Knows files and bytes; decodes nothing and fetches nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pocketllava.errors import ImageError
from pocketllava.models.files import expanded, read_regular
from pocketllava.types import MAX_FILE_BYTES, ImageSource, read_file
from pocketllava.vision.containers import exif

SETTLED_S = 2.0  # a file changed since may change again without another time of change (FAT counts 2 s)
STRIP_BYTES = 4 << 20  # of pixels, hashed at once

Content = Image.Image | npt.NDArray[np.generic] | bytes


@dataclass(frozen=True)
class FileState:
    """What tells a file's content from an earlier one's without reading it."""

    path: str
    device: int
    inode: int
    n_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState | None:
        """The state of a file; None if there is none, or it was changed a moment ago."""
        try:
            stat = path.stat()
        except (OSError, ValueError):
            return None
        if time.time() - stat.st_mtime < SETTLED_S:
            return None
        return cls(os.fspath(path), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def identity(source: ImageSource) -> FileState | str | None:
    """What tells a source's content without reading or decoding it: a file's state, a data URI's hash; or None."""
    if _is_data_uri(source):
        return hashlib.sha256(str(source).encode("utf-8", "surrogatepass")).hexdigest()
    path = path_of(source)
    return FileState.of(path) if path is not None else None


def path_of(source: ImageSource) -> Path | None:
    """The file that a source names, or None for one that is not a path. Raises ImageError for a URL."""
    if not isinstance(source, str | os.PathLike) or _is_data_uri(source):
        return None
    if isinstance(source, str) and source.split(":", 1)[0].lower() in ("http", "https", "file", "ftp"):
        raise ImageError(f"{source.split(':', 1)[0]} URL: not opened; give a path, bytes or a data URI")
    return expanded(source)


def name_of(source: ImageSource) -> str:
    """What to call it in an error."""
    if _is_data_uri(source):
        return "data URI"
    return str(expanded(source)) if isinstance(source, str | os.PathLike) else "image"


def read(source: ImageSource) -> Content:
    """The pixels of a PIL image or an array as they are; the encoded bytes of anything else. Raises ImageError."""
    if isinstance(source, np.ndarray | Image.Image):
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        _check_bytes(len(source) if isinstance(source, bytes | bytearray) else source.nbytes, "image")
        return bytes(source)
    if isinstance(source, str) and _is_data_uri(source):
        return _decode_data_uri(source)
    if hasattr(source, "read"):
        return read_file(source)
    if (path := path_of(source)) is None:
        raise ImageError(
            f"image: found {type(source).__name__}, expected a path, bytes, an open file, a data URI, a PIL image"
            " or an array"
        )
    try:
        return read_regular(path, MAX_FILE_BYTES)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def digest(content: Content) -> str:
    """SHA-256 of what read() gave: equal content is the same picture, wherever it came from."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    if isinstance(content, np.ndarray):
        sha256 = hashlib.sha256(repr((content.dtype.str, content.shape)).encode() + b"\0")
        for top in range(0, len(content), n_rows := max(1, STRIP_BYTES // max(1, content[0].nbytes))):
            sha256.update(np.ascontiguousarray(content[top : top + n_rows]).data)
        return sha256.hexdigest()
    content.load()
    transparency, palette = (
        content.info.get("transparency"),
        content.getpalette() if content.palette else None,
    )
    about = repr((content.mode, content.size, transparency, palette, orientation_of(content)))
    sha256 = hashlib.sha256(about.encode() + b"\0")
    for top in range(0, content.height, n_rows := max(1, STRIP_BYTES // (4 * content.width))):
        sha256.update(content.crop((0, top, content.width, min(top + n_rows, content.height))).tobytes())
    return sha256.hexdigest()


def orientation_of(image: Image.Image) -> int | None:
    """What its EXIF says of which side is up. No other tag is read, so that none can be wrong."""
    try:
        value = image.getexif().get(exif.ORIENTATION)
    except Exception:  # whatever Pillow makes of damaged metadata, the picture itself may be whole
        return None
    return value if isinstance(value, int) else None


def _check_bytes(n_bytes: int, name: str) -> None:
    if n_bytes > MAX_FILE_BYTES:
        raise ImageError(f"{name}: {n_bytes} bytes, expected at most {MAX_FILE_BYTES}")


def _is_data_uri(source: ImageSource) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def _decode_data_uri(uri: str) -> bytes:
    """RFC 2397, base64 only."""
    head, comma, body = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError("data URI: expected data:image/...;base64,...")
    try:
        _check_bytes(len(body) * 3 // 4, "data URI")
        return base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise ImageError(f"data URI: not base64 ({error})") from error

"""WebP -> its EXIF and XMP, and what decoding takes: libwebp composes frames, in four copies of the picture."""

from __future__ import annotations

import struct

from pocketllava.vision.containers.encoded import MAX_BLOCKS, MAX_METADATA_BYTES, Encoded, Refused

CHUNK = struct.Struct("<4sI")
HEADER_BYTES = 12


def is_webp(content: bytes) -> bool:
    """Whether a file says that it is one."""
    return content[:4] == b"RIFF" and content[8:12] == b"WEBP"


def read(content: bytes) -> Encoded:
    """Raises Refused."""
    metadata, position = {b"EXIF": b"", b"XMP ": b""}, HEADER_BYTES
    for _ in range(MAX_BLOCKS):
        if position + CHUNK.size > len(content):
            break
        name, n_bytes = CHUNK.unpack_from(content, position)
        start = position + CHUNK.size
        if name in metadata and not metadata[name]:
            metadata[name] = content[start : start + min(n_bytes, MAX_METADATA_BYTES)]
        position = start + n_bytes + (n_bytes & 1)
    else:
        raise Refused(f"a WebP of more than {MAX_BLOCKS} chunks")
    exif, xmp = metadata[b"EXIF"], metadata[b"XMP "]
    return Encoded(format="WEBP", kind="WebP", data=content, pixel_bytes=16, pixel_ns=55, exif=exif, xmp=xmp)

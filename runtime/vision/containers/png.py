"""PNG -> the chunks that pixels need, its EXIF and XMP, and what its rows take.

Text chunks may expand, and a file may have millions of chunks; Pillow would read them all.
"""

from __future__ import annotations

import re
import struct
import zlib

from pocketllava.vision.containers.encoded import MAX_METADATA_BYTES, Encoded, Refused

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 200_000  # 512 MB in chunks of 4 kB
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
XMP, EXIF_TEXT = b"XML:com.adobe.xmp\0", b"Raw profile type exif\0"
CHUNK = struct.Struct(">I4s")
RAW_BYTE_NS, BYTE_NS, SLOW_RAW_BYTE_NS, INTERLACED_NS = 4, 12, 10, 8


def read(content: bytes) -> Encoded:
    """Raises Refused."""
    view = memoryview(content)
    kept, exif, xmp, position = [view[: len(SIGNATURE)]], b"", b"", len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        if position + CHUNK.size > len(content):
            break
        n_bytes, kind = CHUNK.unpack_from(content, position)
        end = position + CHUNK.size + n_bytes + 4
        if kind in PIXELS:
            kept.append(view[position:end])
        elif kind == b"eXIf" and not exif:
            exif = content[position + CHUNK.size : end - 4][:MAX_METADATA_BYTES]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            body = content[position + CHUNK.size : end - 4][:MAX_METADATA_BYTES]
            if body.startswith(XMP):
                xmp = _text(kind, body)
            elif body.startswith(EXIF_TEXT) and not exif:
                exif = _hexadecimal(_text(kind, body))
        position = end
        if kind == b"IEND":
            break
    else:
        raise Refused(f"a PNG of more than {MAX_CHUNKS} chunks")
    data = content if sum(map(len, kept)) == len(content) else b"".join(kept)
    depth, color, interlaced = data[24:25] + b"\0", data[25:26] + b"\0", data[28:29] == b"\1"
    raw = max(1, CHANNELS.get(color[0], 4) * (depth[0] or 8)) / 8  # bytes of a pixel
    fast = len(data) * BYTE_NS < raw * _n_pixels(data) * (SLOW_RAW_BYTE_NS - RAW_BYTE_NS)
    return Encoded(
        format="PNG",
        kind="PNG",
        data=data,
        pixel_bytes=1 if color[0] in (0, 3) and depth[0] < 16 else 4,
        pixel_ns=raw * (RAW_BYTE_NS if fast else SLOW_RAW_BYTE_NS) + INTERLACED_NS * interlaced,
        fixed_ns=len(data) * BYTE_NS if fast else 0,
        exif=exif,
        xmp=xmp,
    )


def _n_pixels(data: bytes) -> int:
    return int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")


def _text(kind: bytes, body: bytes) -> bytes:
    """A text chunk's text, expanded to at most MAX_METADATA_BYTES; empty where it cannot be read."""
    _, _, text = body.partition(b"\0")
    compressed = kind == b"zTXt"
    if kind == b"iTXt":
        compressed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]  # behind language and translated keyword
    elif compressed:
        text = text[1:]
    try:
        return zlib.decompressobj().decompress(text, MAX_METADATA_BYTES) if compressed else text
    except zlib.error:
        return b""


def _hexadecimal(text: bytes) -> bytes:
    """ImageMagick's way to keep EXIF: three lines, then hexadecimal digits."""
    digits = b"".join(text.split(b"\n")[3:])
    return bytes.fromhex(digits.decode()) if re.fullmatch(rb"(?:[0-9a-fA-F]{2}|\s)+", digits) else b""

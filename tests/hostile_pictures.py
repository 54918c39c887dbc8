"""Small files that would take long or much to decode: what a stranger sends. Each is written here, none is stored."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFile

Entry = tuple[int, int, int, bytes]  # tag, type, count, value or the bytes it lies at


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """As a file of that format."""
    buffer, usual = io.BytesIO(), ImageFile.MAXBLOCK
    ImageFile.MAXBLOCK = 1 << 28  # room for noise, which Pillow's encoder wants in one piece
    image.save(buffer, kind, **options)
    ImageFile.MAXBLOCK = usual
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    """By Pillow alone."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def saved(image: Any) -> bytes:
    """What an object's save() writes."""
    buffer = io.BytesIO()
    image.save(buffer, quality=95)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    """Of a JPEG."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, color: int, data: bytes, *chunks: bytes) -> bytes:
    """color: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA. data: the rows, not compressed."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data, 1))
    return b"".join((b"\x89PNG\r\n\x1a\n", header, *chunks, body, chunk(b"IEND", b"")))


def tiff(entries: list[Entry], rest: bytes = b"", n_entries: int | None = None) -> bytes:
    """A little-endian TIFF of one directory; values of more than four bytes are put behind it."""
    start = 8 + 2 + 12 * len(entries) + 4
    rows, body = b"", b""
    for tag, kind, count, value in entries:
        place = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", start + len(body))
        body += value if len(value) > 4 else b""
        rows += struct.pack("<HHI", tag, kind, count) + place
    head = b"II*\0" + struct.pack("<IH", 8, len(entries) if n_entries is None else n_entries)
    return head + rows + bytes(4) + body + rest


def short(tag: int, value: int) -> Entry:
    """An entry of one 16-bit number."""
    return tag, 3, 1, struct.pack("<H", value)


def long(tag: int, *values: int) -> Entry:
    """An entry of 32-bit numbers."""
    return tag, 4, len(values), struct.pack(f"<{len(values)}I", *values)


def scans(side: int, number: int) -> bytes:
    """A progressive JPEG that repeats its last scan."""
    data = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * number + b"\xff\xd9"


def photo_bytes(kind: str, side: int = 64, **options: Any) -> bytes:
    """A small intact picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    return encoded(Image.fromarray(pixels), kind, **options)


def jpeg_with(*segments: bytes) -> bytes:
    """A JPEG with more segments in front."""
    data = photo_bytes("JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def wide_directory(n_entries: int) -> bytes:
    """EXIF whose every entry has all of it for a value."""
    place = 8 + 2 + 12 * n_entries + 4
    rows = b"".join(struct.pack("<HHII", 0x9000 + n, 7, 50_000, 8) for n in range(n_entries))
    return b"II*\0" + struct.pack("<IH", 8, n_entries) + rows + bytes(max(4, 60_000 - place))


def sixteen_bits(width: int, height: int, color: int) -> bytes:
    """A PNG of zeros in 16 bits."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color]
    return png(width, height, 16, color, bytes((1 + 2 * channels * width) * height))


def bitmap_runs(width: int, height: int, runs: bytes) -> bytes:
    """A run-length encoded BMP."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    start = 14 + 40 + 1024
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + bytes(1024) + runs


def gif_comment(n_blocks: int) -> bytes:
    """A GIF with a long comment in front."""
    data = photo_bytes("GIF")
    start = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    return data[:start] + b"!\xfe" + (b"\xff" + b"c" * 255) * n_blocks + b"\0" + data[start:]


def tiff_of(compression: int, width: int, height: int, *more: Entry, data: bytes = b"") -> bytes:
    """8-bit gray, with its data at the end."""
    entries = [
        long(256, width),
        long(257, height),
        short(258, 8),
        short(259, compression),
        short(262, 1),
        *more,
    ]
    return tiff(sorted(entries), data)


def webp_chunks(number: int) -> bytes:
    """A WebP with many empty chunks behind its picture."""
    data = photo_bytes("WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
    data += b"JUNK\0\0\0\0" * number
    return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a JPEG of 3,000 scans": lambda: scans(4000, 3000),
    "a JPEG of 40 scans and 36 megapixels": lambda: scans(6000, 30),
    "a JPEG of 100 scans and 49 megapixels": lambda: scans(7000, 100),
    "a JPEG of a million comments": lambda: jpeg_with(segment(0xFE, b"") * 1_000_000),
    "a JPEG of 2,000 long EXIF segments": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 2_000),
    "EXIF of 5,000 long values": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + wide_directory(4_900))),
    "a JPEG of many Photoshop blocks": lambda: jpeg_with(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5_000) * 300),
    "arithmetic coding": lambda: photo_bytes("JPEG").replace(b"\xff\xc0", b"\xff\xc9", 1),
    "16-bit gray of 49 megapixels": lambda: sixteen_bits(7000, 7000, 0),
    "16-bit RGB of 49 megapixels": lambda: sixteen_bits(7000, 7000, 2),
    "16-bit RGBA of 49 megapixels": lambda: sixteen_bits(7000, 7000, 6),
    "RGBA of 49 megapixels": lambda: png(7000, 7000, 8, 6, bytes((1 + 4 * 7000) * 7000)),
    "gray and alpha of 49 megapixels": lambda: png(7000, 7000, 8, 4, bytes((1 + 2 * 7000) * 7000)),
    "a transparent palette of 49 megapixels": lambda: png(7000, 7000, 8, 3, bytes(7001 * 7000), chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(256))),
    "RGB of 49 megapixels with a transparent color": lambda: png(7000, 7000, 8, 2, bytes((1 + 3 * 7000) * 7000), chunk(b"tRNS", bytes(6))),
    "a PNG of expanding texts": lambda: png(9, 9, 8, 0, bytes(90), *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 300),
    "a PNG of a million chunks": lambda: png(9, 9, 8, 0, bytes(90), chunk(b"abCd", b"") * 1_000_000),
    "a PNG of an expanding profile": lambda: png(9, 9, 8, 0, bytes(90), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
    "a PNG with 60 MB of EXIF directories": lambda: png(9, 9, 8, 0, bytes(90), chunk(b"eXIf", wide_directory(4_900) + bytes(60_000_000))),
    "rows beyond a PNG's end": lambda: png(9, 9, 8, 0, bytes(100_000_000)),
    "a GIF with a long comment": lambda: gif_comment(60_000),
    "a GIF of 49 megapixels": lambda: encoded(Image.new("P", (7000, 7000)), "GIF"),
    "a GIF of 2,000 frames": lambda: encoded(Image.new("P", (500, 500)), "GIF", save_all=True, append_images=[Image.new("P", (500, 500), n % 256) for n in range(1, 400)]),
    "a BMP of one-pixel runs": lambda: bitmap_runs(6000, 6000, b"\1\7" * 8_000_000),
    "a BMP of ended lines": lambda: bitmap_runs(40_000_000, 1, b"\1\7\0\0"),
    "a WebP of 49 megapixels": lambda: encoded(Image.new("RGB", (7000, 7000), (9, 90, 200)), "WEBP", method=0),
    "a lossless WebP of 36 megapixels": lambda: encoded(Image.new("RGB", (6000, 6000)), "WEBP", lossless=True, method=0),
    "a WebP of a million chunks": lambda: webp_chunks(1_000_000),
    "a TIFF of long values": lambda: tiff([*[(0x9000 + n, 7, 20_000_000, b"12345") for n in range(4_000)]], bytes(20_100_000)),
    "a TIFF of 65,535 long values": lambda: tiff([short(256, 9)] + [(700, 7, 60_000_000, b"12345")] * 65_000, bytes(61_000_000)),
    "a TIFF of millions of strips": lambda: tiff_of(1, 1, 40_000_000, long(278, 1), long(273, *range(8, 8_000_008))),
    "a TIFF of one huge tile": lambda: tiff_of(5, 9, 9, long(322, 1 << 16), long(323, 1 << 15), long(324, 8), long(325, 99), data=bytes(999)),
    "an LZMA TIFF": lambda: tiff_of(34925, 900, 900, long(273, 8), long(279, 99), data=bytes(999)),
    "a deflated TIFF of 49 megapixels": lambda: encoded(Image.new("RGB", (7000, 7000)), "TIFF", compression="tiff_adobe_deflate"),
    "a CMYK TIFF of 49 megapixels": lambda: encoded(Image.new("CMYK", (7000, 7000)), "TIFF", compression="tiff_lzw"),
    "a float TIFF of 49 megapixels": lambda: encoded(Image.new("F", (7000, 7000)), "TIFF", compression="tiff_adobe_deflate"),
    "a 32-bit TIFF of 49 megapixels": lambda: encoded(Image.new("I", (7000, 7000), 70_000), "TIFF", compression="tiff_adobe_deflate"),
    "a G4 TIFF of 49 megapixels": lambda: encoded(Image.effect_noise((7000, 7000), 90).convert("1"), "TIFF", compression="group4"),
    "a TIFF of one row": lambda: encoded(Image.new("RGBA", (40_000_000, 1)), "TIFF", compression="tiff_lzw"),
    "an AVIF of 40 megapixels": lambda: encoded(Image.new("RGB", (8000, 5000)), "AVIF", speed=10),
    "a rotated JPEG of 49 megapixels": lambda: encoded(Image.new("RGB", (7000, 7000)), "JPEG", exif=b"Exif\0\0" + tiff([short(0x112, 6)])),
    "a noisy progressive 4:4:4 JPEG": lambda: photo_bytes("JPEG", 5900, quality=70, subsampling=0, progressive=True),
    "a noisy JPEG of 49 megapixels": lambda: photo_bytes("JPEG", 7000, quality=90, subsampling=0),
    "a noisy PNG of 49 megapixels": lambda: photo_bytes("PNG", 7000, compress_level=1),
}  # fmt: skip

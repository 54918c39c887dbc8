"""TIFF -> a copy whose only directory has the tags that pixels need, its orientation, and what decoding takes.

A directory may name the whole file as the value of each of 65,535 tags; Pillow would copy it as often.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from pocketllava.vision.containers import exif
from pocketllava.vision.containers.encoded import MAX_METADATA_BYTES, Encoded, Refused

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WIDTH, LENGTH, BITS, COMPRESSION, SAMPLES, ROWS, PLANAR = 256, 257, 258, 259, 277, 278, 284
TILE_WIDTH, TILE_LENGTH, JPEG_TABLES, XMP = 322, 323, 347, 700
PLACES = (273, 279, 324, 325)  # offsets and sizes of strips, and of tiles
# photometric interpretation, fill order, CCITT options, predictor, color map, extra samples, sample format, YCbCr
OTHERS = (262, 266, 292, 293, 317, 320, 338, 339, 529, 530, 531, 532)
SHAPE = (WIDTH, LENGTH, BITS, COMPRESSION, SAMPLES, ROWS, PLANAR, TILE_WIDTH, TILE_LENGTH, JPEG_TABLES)
PIXELS = (*SHAPE, *PLACES, *OTHERS)
TYPE_BYTES = exif.TYPE_BYTES | {17: 8, 18: 8}
INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # type -> struct's code
NONE, LZW, JPEG, DEFLATE, OLD_DEFLATE, PACKBITS = 1, 5, 7, 8, 32946, 32773
COMPRESSIONS = {
    NONE: 4,
    LZW: 6,
    JPEG: 10,
    DEFLATE: 6,
    OLD_DEFLATE: 6,
    PACKBITS: 4,
}  # -> ns for a byte of pixels
COMPRESSIONS |= dict.fromkeys((2, 3, 4), 60)  # CCITT, eight pixels a byte
NAMES = {
    6: "old-style JPEG",
    34712: "JPEG 2000",
    34887: "LERC",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
}
MAX_PIECES = 100_000  # strips or tiles
MAX_VALUES = 4096  # of another tag; a color map has 768
PIECE_NS = 20_000


@dataclass(frozen=True)
class Layout:
    """The byte order and the widths of a file's offsets: TIFF's, or BigTIFF's."""

    order: str
    big: bool

    @property
    def entry_bytes(self) -> int:
        """Tag, type, count and value."""
        return 20 if self.big else 12

    def number(self, content: bytes, at: int, code: str) -> int:
        """The integer at an offset. Raises Refused."""
        try:
            return int(struct.unpack_from(self.order + code, content, at)[0])
        except struct.error:
            raise Refused("a TIFF whose directory lies outside the file") from None


@dataclass(frozen=True)
class Entry:
    """A tag's type and count, and the offset of its value."""

    type: int
    count: int
    place: int
    raw: bytes


def read(content: bytes) -> Encoded:
    """Raises Refused."""
    layout = Layout("<" if content[:2] == b"II" else ">", 43 in content[2:4])
    entries = _directory(content, layout)
    for tag, entry in entries.items():
        most = (
            MAX_PIECES if tag in PLACES else MAX_METADATA_BYTES if tag in (JPEG_TABLES, XMP) else MAX_VALUES
        )
        if entry.count > most:
            raise Refused(f"a TIFF with {entry.count} values of tag {tag}, expected at most {most}")
    return _encoded(content, layout, entries)


def _directory(content: bytes, layout: Layout) -> dict[int, Entry]:
    """The entries of the first directory that matter here, by tag; the first whole one counts."""
    start = layout.number(content, 8 if layout.big else 4, "Q" if layout.big else "I")
    n_entries = layout.number(content, start, "Q" if layout.big else "H")
    first, entries = start + (8 if layout.big else 2), dict[int, Entry]()
    for at in range(first, first + min(n_entries, 65_535) * layout.entry_bytes, layout.entry_bytes):
        raw = content[at : at + layout.entry_bytes]
        if len(raw) < layout.entry_bytes:
            break
        tag, kind = struct.unpack_from(layout.order + "HH", raw)
        if tag in (*PIXELS, XMP, exif.ORIENTATION) and kind in TYPE_BYTES:
            count = layout.number(raw, 4, "Q" if layout.big else "I")
            n_bytes, field = TYPE_BYTES[kind] * count, 8 if layout.big else 4
            value = layout.entry_bytes - field
            place = at + value if n_bytes <= field else layout.number(raw, value, "Q" if layout.big else "I")
            if count and place + n_bytes <= len(content):
                entries.setdefault(tag, Entry(kind, count, place, raw))
    return entries


def _encoded(content: bytes, layout: Layout, entries: dict[int, Entry]) -> Encoded:
    compression = _integer(content, layout, entries, COMPRESSION, NONE)
    if compression not in COMPRESSIONS:
        name = NAMES.get(compression, f"number {compression}")
        raise Refused(f"a TIFF with compression {name}, expected none, LZW, Deflate, PackBits, CCITT or JPEG")
    width, length = (_integer(content, layout, entries, tag, 0) for tag in (WIDTH, LENGTH))
    rows, tile_width, tile_length = (
        _integer(content, layout, entries, tag, 0) for tag in (ROWS, TILE_WIDTH, TILE_LENGTH)
    )
    samples = max(_integer(content, layout, entries, SAMPLES, 1), 1)
    raw = samples * max(_integer(content, layout, entries, BITS, 1), 1) / 8  # bytes of a pixel
    across, down = tile_width or width or 1, tile_length or min(rows or length, length) or 1
    n_pieces = -(-width // across) * -(-length // down)
    if _integer(content, layout, entries, PLANAR, 1) == 2:
        n_pieces *= samples
    n_pieces = max(n_pieces, *(entries[tag].count for tag in PLACES if tag in entries), 1)
    if n_pieces > MAX_PIECES:
        raise Refused(f"a TIFF of {n_pieces} strips or tiles, expected at most {MAX_PIECES}")
    if compression == JPEG and content.count(b"\xff\xda") > 4 * n_pieces + 4:
        raise Refused("a TIFF of JPEG strips with many scans; save it again")
    padding = max(1.0, across * down * n_pieces / max(1, width * length)) if tile_width else 1.0
    return Encoded(
        format="TIFF",
        kind="TIFF",
        data=_rewritten(content, layout, entries),
        pixel_bytes=4,
        pixel_ns=4 + COMPRESSIONS[compression] * raw * padding,
        fixed_bytes=0 if compression == NONE else math.ceil(across * down * raw) + len(content),
        fixed_ns=n_pieces * PIECE_NS,
        exif=_orientation(content, layout, entries),
        xmp=_bytes(content, entries, XMP),
    )


def _rewritten(content: bytes, layout: Layout, entries: dict[int, Entry]) -> bytes:
    """The file with one directory, at its end, of nothing but what pixels need."""
    kept = b"".join(entry.raw for tag, entry in sorted(entries.items()) if tag in PIXELS)
    n_entries = len(kept) // layout.entry_bytes
    word, small = (
        (layout.order + "Q", layout.order + "Q") if layout.big else (layout.order + "I", layout.order + "H")
    )
    header = 16 if layout.big else 8
    view, start = memoryview(content), len(content) + len(content) % 2
    return b"".join(
        (
            view[: header - struct.calcsize(word)],
            struct.pack(word, start),
            view[header:],
            bytes(len(content) % 2),
            struct.pack(small, n_entries),
            kept,
            struct.pack(word, 0),
        )
    )


def _integer(content: bytes, layout: Layout, entries: dict[int, Entry], tag: int, default: int) -> int:
    """The first number of a tag; the default where it is missing or no whole number."""
    entry = entries.get(tag)
    if entry is None or entry.type not in INTEGERS or not entry.count:
        return default
    return layout.number(content, entry.place, INTEGERS[entry.type])


def _bytes(content: bytes, entries: dict[int, Entry], tag: int) -> bytes:
    entry = entries.get(tag)
    return b"" if entry is None else content[entry.place : entry.place + entry.count * TYPE_BYTES[entry.type]]


def _orientation(content: bytes, layout: Layout, entries: dict[int, Entry]) -> bytes:
    """The orientation as EXIF has it: a TIFF structure of one tag."""
    value = _integer(content, layout, entries, exif.ORIENTATION, 0)
    if not 0 < value < 1 << 16:
        return b""
    return struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, exif.ORIENTATION, 3, 1, value, 0, 0)

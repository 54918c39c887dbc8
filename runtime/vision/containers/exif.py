"""EXIF or XMP -> which side of a picture is up. No other tag is read, so that no other can be wrong.

Gives what Pillow's ImageOps.exif_transpose goes by, in a few steps, however large the metadata claims to be.
"""

from __future__ import annotations

import math
import re
import struct

ORIENTATION = 0x0112
PREFIX = b"Exif\0\0"
ORDERS = {b"II": "<", b"MM": ">"}
TYPE_BYTES = dict.fromkeys((1, 2, 6, 7), 1) | dict.fromkeys((3, 8), 2) | dict.fromkeys((4, 9, 11, 13), 4)
TYPE_BYTES |= dict.fromkeys((5, 10, 12, 16), 8)
NUMBERS = {3: "H", 4: "I", 5: "II", 6: "b", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d", 13: "I", 16: "Q"}
ENTRY_BYTES = 12
IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def orientation(exif: bytes, xmp: bytes = b"") -> int | None:
    """1 to 8 as stored, or None where neither says."""
    value = _tag(exif)
    if value is None and (match := IN_XMP.search(xmp)):
        return int(match[1])
    return value


def _tag(exif: bytes) -> int | None:
    """The orientation tag of the first directory."""
    while exif.startswith(PREFIX):
        exif = exif[len(PREFIX) :]
    order = ORDERS.get(exif[:2])
    if order is None or len(exif) < 8:
        return None
    start = int(struct.unpack_from(order + "I", exif, 4)[0])
    if start + 2 > len(exif):
        return None
    n_entries = struct.unpack_from(order + "H", exif, start)[0]
    end = min(len(exif) - ENTRY_BYTES + 1, start + 2 + n_entries * ENTRY_BYTES)
    for at in range(start + 2, end, ENTRY_BYTES):
        tag, kind, count = struct.unpack_from(order + "HHI", exif, at)
        n_bytes = TYPE_BYTES.get(kind, 0) * count
        place = at + 8 if n_bytes <= 4 else int(struct.unpack_from(order + "I", exif, at + 8)[0])
        if tag == ORIENTATION and 0 < n_bytes <= len(exif) - place:  # the first whole one counts
            return _number(exif, place, order, NUMBERS.get(kind, ""))
    return None


def _number(exif: bytes, place: int, order: str, code: str) -> int | None:
    """The whole number at an offset; struct's code of two is a ratio, and none is no number."""
    if not code:
        return None
    number, divisor = (*struct.unpack_from(order + code, exif, place), 1)[:2]
    value = number / divisor if divisor else 0
    return int(value) if math.isfinite(value) and value == value // 1 else None

"""EXIF or XMP -> which side of a picture is up. No other tag is read, so that no other can be wrong.

Gives what Pillow's ImageOps.exif_transpose goes by, in a few steps, however large the metadata claims to be.
"""

from __future__ import annotations

import re
import struct

ORIENTATION = 0x0112
PREFIX = b"Exif\0\0"
ORDERS = {b"II": "<", b"MM": ">"}
NUMBERS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I"}  # type -> struct's code
RATIOS = {5: "II", 10: "ii"}
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
    values = [
        _value(exif, order, at)
        for at in range(start + 2, end, ENTRY_BYTES)
        if struct.unpack_from(order + "H", exif, at)[0] == ORIENTATION
    ]
    return values[-1] if values else None


def _value(exif: bytes, order: str, at: int) -> int | None:
    """The first number of the entry at an offset, if it is whole."""
    kind, count = struct.unpack_from(order + "HI", exif, at + 2)
    code = NUMBERS.get(kind) or RATIOS.get(kind)
    if code is None or not count:
        return None
    inline = struct.calcsize(order + code) * count <= 4
    place = at + 8 if inline else struct.unpack_from(order + "I", exif, at + 8)[0]
    if place + struct.calcsize(order + code) > len(exif):
        return None
    number, divisor = (*struct.unpack_from(order + code, exif, place), 1)[:2]
    value = number / divisor if divisor else 0
    return int(value) if value == value // 1 else None

"""An image file that is known to be decoded in bounded time and memory: what every format's reader returns.

Knows no format. Readers walk a file's structure with few steps, however large it is, and copy only what pixels need:
no decoder ever sees metadata.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_BLOCKS = 20_000  # segments, chunks or directory entries of a file: photographs have a hundred
MAX_METADATA_BYTES = 1 << 20  # of EXIF or XMP: an EXIF segment has at most 64 kB


class Refused(ValueError):
    """The file is of a kind, or of a structure, that is not opened. The message says which and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A file as its decoder gets it, and what decoding takes.

    format: Pillow's name; kind: in errors. exif: a TIFF structure, behind "Exif" and two zeros or not. xmp: XML.
    Decoding takes fixed_bytes + n_pixels * pixel_bytes of memory, and fixed_ns + n_pixels * pixel_ns nanoseconds
    on a slow core (benchmarks/pillow_suite.py measures both); the decoded picture is counted.
    """

    format: str
    kind: str
    data: bytes
    pixel_bytes: float
    pixel_ns: float
    fixed_bytes: int = 0
    fixed_ns: int = 0
    exif: bytes = b""
    xmp: bytes = b""

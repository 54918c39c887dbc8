"""BMP -> what decoding takes. Pillow reads run-length encoded bitmaps in Python, byte by byte."""

from __future__ import annotations

from pocketllava.vision.containers.encoded import Encoded

SIGNATURE = b"BM"
RLE8, RLE4 = 1, 2
RLE_PIXEL_NS, RLE_BYTE_NS = 120, 400


def read(content: bytes) -> Encoded:
    """Raises nothing: Pillow checks the few numbers of the header."""
    long_header = int.from_bytes(content[14:18], "little") >= 40
    bits, compression = int.from_bytes(content[28:30], "little"), int.from_bytes(content[30:34], "little")
    runs = long_header and compression in (RLE8, RLE4)
    return Encoded(
        format="BMP",
        kind="run-length encoded BMP" if runs else "BMP",
        data=content,
        pixel_bytes=4 if runs or bits > 8 or not long_header else 1,
        pixel_ns=RLE_PIXEL_NS if runs else 4,
        fixed_ns=len(content) * RLE_BYTE_NS if runs else 0,
    )

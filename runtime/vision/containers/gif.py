"""GIF -> its first frame, without comments and extensions. Pillow reads all that stand before a frame."""

from __future__ import annotations

from pocketllava.vision.containers.encoded import MAX_BLOCKS, Encoded, Refused

SIGNATURES = (b"GIF87a", b"GIF89a")
EXTENSION, IMAGE, TRAILER, CONTROL = 0x21, 0x2C, 0x3B, 0xF9
HEADER_BYTES = 13


def read(content: bytes) -> Encoded:
    """Raises Refused."""
    flags = content[10] if len(content) > 10 else 0
    position = HEADER_BYTES + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    header, controls = content[:position], b""
    for _ in range(MAX_BLOCKS):
        kind = content[position] if position < len(content) else TRAILER
        if kind == TRAILER:
            raise Refused("a GIF without a picture")
        if kind == IMAGE:
            break
        end = position + 1
        if kind == EXTENSION:
            end = _after_blocks(content, position + 2)
            if content[position + 1 : position + 2] == bytes([CONTROL]):
                controls = content[position:end]
        position = end
    else:
        raise Refused(f"a GIF of more than {MAX_BLOCKS} blocks before its picture")
    data = b"".join((header, controls, memoryview(content)[position:]))
    return Encoded(format="GIF", kind="GIF", data=data, pixel_bytes=5, pixel_ns=15)


def _after_blocks(content: bytes, position: int) -> int:
    """The offset behind a row of blocks, each with its length in front."""
    for _ in range(MAX_BLOCKS):
        n_bytes = content[position] if position < len(content) else 0
        position += 1 + n_bytes
        if not n_bytes:
            return position
    raise Refused(f"a GIF with an extension of more than {MAX_BLOCKS} blocks")

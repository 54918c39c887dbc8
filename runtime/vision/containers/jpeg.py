"""JPEG -> its segments without metadata, its EXIF and XMP, and how often a decoder goes over the picture.

A progressive file may have thousands of scans of ten bytes, and each takes as long as a picture.
"""

from __future__ import annotations

import re

from pocketllava.vision.containers.encoded import MAX_BLOCKS, MAX_METADATA_BYTES, Encoded, Refused

SIGNATURE = b"\xff\xd8\xff"
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
APP0, APP1, APP14, APP15, COMMENT = 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
START_OF_SCAN, END = 0xDA, 0xD9
FRAMES = {0xC0: "baseline", 0xC1: "sequential", 0xC2: "progressive"}
OTHER_FRAMES = {0xC3: "lossless"} | dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical")
OTHER_FRAMES |= dict.fromkeys((0xC9, 0xCA, 0xCB), "arithmetic-coded")
BARE = (0x01, *range(0xD0, 0xD9))  # markers without a length: TEM, RST0 to RST7, SOI
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]", re.S)  # restarts inside a scan are none
PIXEL_NS, SCAN_NS, BYTE_NS, PROGRESSIVE_BYTE_NS = 9, 1.2, 12, 36


def read(content: bytes) -> Encoded:
    """Raises Refused."""
    kept, exif, xmp = [content[:2]], b"", b""
    frame, position, n_scans, n_blocks, first_scan = b"", 2, 0, 0, 0
    progressive = False
    while (match := MARKER.search(content, position)) is not None:
        marker, position = content[match.start() + 1], match.end()
        n_blocks += 1
        if n_blocks > MAX_BLOCKS:
            raise Refused(f"a JPEG of more than {MAX_BLOCKS} segments")
        if marker == END:
            break
        if marker in BARE:
            continue
        end = position + max(2, int.from_bytes(content[position : position + 2], "big"))
        body = content[position + 2 : end] if not first_scan or marker in FRAMES else b""
        if marker in OTHER_FRAMES:
            raise Refused(f"{OTHER_FRAMES[marker]} JPEG, expected baseline or progressive; save it again")
        if marker in FRAMES:
            frame, progressive = body, marker == 0xC2
        if marker == START_OF_SCAN:
            n_scans += 1
            first_scan = first_scan or match.start()
        elif not first_scan:
            if marker == APP1 and body.startswith(EXIF) and len(exif) < MAX_METADATA_BYTES:
                exif += body[len(EXIF) :] if exif else body
            elif marker == APP1 and body.startswith(XMP):
                xmp = body[len(XMP) :]
            if not (APP0 < marker <= APP15 or marker == COMMENT) or marker == APP14:
                kept.append(content[match.start() : end])
        position = end
    # Only the first image's scans are there to be decoded; what follows its end is a thumbnail or a film.
    data = b"".join(kept) + content[first_scan : position if first_scan else 0]
    several = progressive or n_scans > 1
    samples = _samples_per_pixel(frame)
    return Encoded(
        format="JPEG",
        kind=f"JPEG of {n_scans} scans" if several else "JPEG",
        data=data,
        pixel_bytes=(1 if len(frame) > 5 and frame[5] == 1 else 4) + (2 * samples if several else 0),
        pixel_ns=PIXEL_NS + (SCAN_NS * samples * n_scans if several else 0),
        fixed_ns=len(data) * (PROGRESSIVE_BYTE_NS if several else BYTE_NS),
        exif=exif,
        xmp=xmp,
    )


def _samples_per_pixel(frame: bytes) -> float:
    """Of a start-of-frame segment: 3 for 4:4:4, 1.5 for 4:2:0. A part that is larger than the picture counts."""
    factors = [(f >> 4, f & 15) for f in frame[7::3]]
    most = max((h for h, _ in factors), default=1) * max((v for _, v in factors), default=1)
    return sum(h * v for h, v in factors) / max(1, most)

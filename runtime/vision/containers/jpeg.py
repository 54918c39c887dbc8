"""JPEG -> its segments without metadata, its EXIF and XMP, and how often a decoder goes over the picture.

A progressive file may have thousands of scans of ten bytes, and each takes as long as a picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

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
PIXEL_NS, BYTE_NS, PROGRESSIVE_BYTE_NS = 9, 14, 36
FIRST_SCAN_NS, REFINING_SCAN_NS = 0.45, 0.9  # of a sample; a refining scan looks at every coefficient again


def read(content: bytes) -> Encoded:
    """Raises Refused."""
    view = memoryview(content)
    kept: list[memoryview] = [view[:2]]
    exif, xmp, frame, first_scan, position = b"", b"", b"", 0, 2
    scans: list[bytes] = []
    progressive = False
    for _ in range(MAX_BLOCKS):
        match = MARKER.search(content, position)
        if match is None or (marker := content[match.start() + 1]) == END:
            break
        position = match.end()
        if marker in BARE:
            continue
        start, position = (
            position + 2,
            position + max(2, int.from_bytes(view[position : position + 2], "big")),
        )
        if marker in OTHER_FRAMES:
            raise Refused(f"{OTHER_FRAMES[marker]} JPEG, expected baseline or progressive; save it again")
        if marker in FRAMES:
            frame, progressive = content[start:position], marker == 0xC2
        if marker == START_OF_SCAN:
            scans.append(content[start:position])
            first_scan = first_scan or match.start()
        elif not first_scan:
            if marker == APP1 and content.startswith(EXIF, start) and len(exif) < MAX_METADATA_BYTES:
                exif += content[start + (len(EXIF) if exif else 0) : position]
            elif marker == APP1 and content.startswith(XMP, start):
                xmp = content[start + len(XMP) : position]
            if marker == APP14 or not (APP0 < marker <= APP15 or marker == COMMENT):
                kept.append(view[match.start() : position])
    else:
        raise Refused(f"a JPEG of more than {MAX_BLOCKS} segments")
    several = progressive or len(scans) > 1
    samples = _samples_per_pixel(frame)
    data = b"".join((*kept, view[first_scan or len(content) :]))
    return Encoded(
        format="JPEG",
        kind=f"JPEG of {len(scans)} scans" if several else "JPEG",
        data=data,
        pixel_bytes=(1 if len(samples) == 1 else 4) + (2 * sum(samples.values()) if several else 0),
        pixel_ns=PIXEL_NS + (sum(_scan_ns(scan, samples) for scan in scans) if several else 0),
        fixed_ns=len(data) * (PROGRESSIVE_BYTE_NS if several else BYTE_NS),
        exif=exif,
        xmp=xmp,
    )


def _samples_per_pixel(frame: bytes) -> dict[int, float]:
    """By component, of a start-of-frame segment: 1, 1/4 and 1/4 for 4:2:0."""
    factors = {name: (f >> 4, f & 15) for name, f in zip(frame[6::3], frame[7::3], strict=False)}
    most = max((h for h, _ in factors.values()), default=1) * max((v for _, v in factors.values()), default=1)
    return {name: h * v / max(1, most) for name, (h, v) in factors.items()}


def _scan_ns(scan: bytes, samples: Mapping[int, float]) -> float:
    """Nanoseconds for a pixel, of a start-of-scan segment: number of components, their names and tables, range."""
    n_components = scan[0] if scan else 0
    names = scan[1 : 1 + 2 * n_components : 2]
    refining = len(scan) > 0 and scan[-1] >> 4
    return sum(samples.get(n, 1) for n in names) * (REFINING_SCAN_NS if refining else FIRST_SCAN_NS)

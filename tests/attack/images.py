"""Damaged pictures and damaged EXIF: decoded, or refused in one line; the orientation is the one Pillow reads."""

from __future__ import annotations

import functools
import io
import random
import struct
import warnings
from pathlib import Path

import hostile_pictures as hostile
from attack.child import Target
from damage import bytes_changed
from PIL import Image

from pocketllava.models.preprocessing import Preprocessing
from pocketllava.vision.containers import exif
from pocketllava.vision.image_processor import ImageProcessor

NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    127,
    128,
    255,
    256,
    4095,
    32767,
    32768,
    65535,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
)
FORMATS: dict[str, list[dict[str, object]]] = {
    "JPEG": [{}, {"progressive": True}, {"quality": 100, "subsampling": 0}],
    "PNG": [{}, {"compress_level": 0}],
    "GIF": [{}],
    "WEBP": [{}, {"lossless": True}],
    "BMP": [{}],
    "TIFF": [{"compression": c} for c in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")],
}
MODES = {
    "PNG": ("1", "P", "L", "LA", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "P", "L", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LAB"),
}
PLAIN = ("RGB", "L")
KINDS = range(1, 19)


@functools.cache
def whole() -> list[bytes]:
    """Intact files of every format, mode and compression, and the hostile ones that are small."""
    picture = Image.effect_noise((23, 17), 90)
    files = [
        hostile.encoded(picture.convert("RGB" if mode == "I;16" else mode).convert(mode), kind, **options)
        for kind, variants in FORMATS.items()
        for options in variants
        for mode in MODES.get(kind, PLAIN)
        if mode in PLAIN or options.get("compression") != "jpeg"
    ]
    files += [
        hostile.photo_bytes(kind, 16, exif=b"Exif\0\0" + hostile.tiff([hostile.short(0x112, 6)]))
        for kind in ("JPEG", "PNG", "WEBP", "TIFF")
    ]
    frames = [picture.convert("P"), Image.new("P", (23, 17), 5)]
    files += [
        hostile.encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        for kind in ("GIF", "WEBP", "TIFF", "PNG")
    ]
    names = ("a TIFF of one huge tile", "an LZMA TIFF", "arithmetic coding", "a BMP of ended lines")
    return [
        *files,
        *(hostile.HOSTILE[name]() for name in names),
        hostile.bitmap_runs(9, 9, b"\5\7\0\0" * 9 + b"\0\1"),
    ]


def number_changed(rng: random.Random, data: bytes) -> bytes:
    """A 16- or 32-bit number somewhere near the start, in either byte order."""
    code = rng.choice(("<H", ">H", "<I", ">I"))
    at = rng.randrange(max(1, min(len(data), rng.choice((64, 256, 4096))) - 4))
    value = struct.pack(code, rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(code)))
    return data[:at] + value + data[at + len(value) :]


def picture(rng: random.Random) -> bytes:
    """A damaged one, or two of them spliced."""
    data = rng.choice(whole())
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        data = number_changed(rng, data) if rng.random() < 0.6 else bytes_changed(rng, data)
    if rng.random() < 0.05:
        other = rng.choice(whole())
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
    return data[: 1 << 22]


@functools.cache
def processor(pad: bool) -> ImageProcessor:
    """With the limits that everybody has."""
    return ImageProcessor(Preprocessing(pad_to_square=pad), grid=24)


def show(data: bytes, _folder: Path) -> None:
    """Prepare it as any model's picture."""
    pixels = processor(len(data) % 2 == 0).process(data).tiles[0]
    assert pixels.shape == (336, 336, 3)


def exif_of(rng: random.Random) -> bytes:
    """A JPEG whose EXIF has entries of any type, count and place."""
    order = rng.choice("<>")
    n_entries = rng.choice((0, 1, 1, 2, 3, 9))
    rows, turned = b"", False
    for _ in range(n_entries):
        tag = rng.choice((0x112, 0x10F, 0x11A, 0x8769, rng.randrange(1 << 16)))
        tag = 0x10F if tag == 0x112 and turned else tag  # which of two counts depends on Pillow's version
        turned = turned or tag == 0x112
        count = rng.choice((1, 1, 1, 1, 0, 2, 3, 8, 1 << 16, (1 << 32) - 1))
        value = rng.choice(
            (
                struct.pack(order + "HH", rng.randrange(10), rng.randrange(3)),
                struct.pack(order + "I", rng.randrange(200)),
                rng.randbytes(4),
            )
        )
        rows += (
            struct.pack(order + "HHI", tag, rng.choice((3, 3, 3, *KINDS, rng.randrange(1 << 16))), count)
            + value
        )
    start = rng.choice((8, 8, 8, 10, rng.randrange(1 << 16)))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    body = head + bytes(max(0, min(start, 64) - 8)) + struct.pack(order + "H", n_entries) + rows + bytes(4)
    body += b"".join(struct.pack(order + "II", rng.randrange(10), rng.choice((0, 1, 2))) for _ in range(20))
    segment = hostile.segment(0xE1, rng.choice((b"Exif\0\0", b"Exif\0\0", b"Exif\0\0Exif\0\0")) + body)
    data = hostile.photo_bytes("JPEG", 16)
    return data[:2] + segment + data[2:]


def compare_orientation(data: bytes, folder: Path) -> None:
    """With what Pillow's exif_transpose goes by, where Pillow can read the EXIF at all."""
    show(data, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        try:
            pillow = image.getexif().get(exif.ORIENTATION)
        except Exception:
            pillow = None
    if pillow is None:  # where another tag is damaged, Pillow reads none that follow
        return
    value, sides = exif.orientation(image.info.get("exif", b"")), range(1, 9)
    assert (value if value in sides else 1) == (pillow if pillow in sides else 1), (
        f"{value!r}, Pillow has {pillow!r}"
    )


TARGETS = {"images": Target(picture, show), "orientation": Target(exif_of, compare_orientation)}

"""The first bytes of a file -> what it is: one of the formats that are opened, or the name of another.

Knows magic numbers; a file's name says nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from pocketllava.vision.containers import bmp, gif, jpeg, png, tiff, webp
from pocketllava.vision.containers.encoded import Encoded

FORMATS = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs")
AVIF_BRANDS = (b"avif", b"avis")
HEIF_CONTAINERS = (b"mif1", b"msf1", b"miaf")
MAX_BRANDS_BYTES = 256
FILMS = dict.fromkeys((b"isom", b"iso2", b"mp41", b"mp42", b"M4V "), "an MP4 film")
FILMS |= {b"qt  ": "a QuickTime film", b"crx ": "a Canon raw photo"}
OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xffO\xffQ\0", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"II\xbc", "JPEG XR"),
    (b"\0\0\1\0", "an ICO icon"),
    (b"\0\0\2\0", "a CUR cursor"),
    (b"8BPS", "a Photoshop document"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"gimp xcf", "a GIMP document"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"v/1\1", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"SIMPLE  =", "FITS"),
    (b"DICM", "DICOM"),
    (b"icns", "an ICNS icon"),
    (b"FORM", "IFF"),
    (b"BPG\xfb", "BPG"),
    (b"\x01\xda", "SGI"),
    (b"Y\xa6j\x95", "a Sun raster"),
    (b"IIRO", "an Olympus raw photo"),
    (b"FUJIFILM", "a Fujifilm raw photo"),
    (b"\x1aE\xdf\xa3", "a WebM or Matroska film"),
    (b"PK\3\4", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a git-lfs pointer"),
)
TEXTS = ((b"<svg", "an SVG drawing"), (b"<!doctype html", "a web page"), (b"<html", "a web page"))


def reader_of(content: bytes) -> Callable[[bytes], Encoded] | None:
    """What reads the format, for those that are always opened."""
    if webp.is_webp(content):
        return webp.read
    for signatures, read in (
        (jpeg.SIGNATURE, jpeg.read),
        (png.SIGNATURE, png.read),
        (gif.SIGNATURES, gif.read),
        (tiff.SIGNATURES, tiff.read),
        (bmp.SIGNATURE, bmp.read),
    ):
        if content.startswith(signatures):
            return read
    return None


def other_name(content: bytes) -> str | None:
    """What a file is that reader_of() knows nothing of: "HEIC", "AVIF", "JPEG 2000", ...; None for no known one."""
    if content[4:8] == b"ftyp":
        return _boxed(content)
    for signature, name in OTHERS:
        if content.startswith(signature):
            return name
    if content[:1] == b"P" and content[1:2] in b"1234567fF" and content[2:3].isspace():
        return "a PNM picture"
    if content[:4] == b"RIFF":
        return "a RIFF file of sound or film"
    start = content[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<?xml") and b"<svg" in start:
        return "an SVG drawing"
    return next((name for text, name in TEXTS if start.startswith(text)), None)


def _boxed(content: bytes) -> str | None:
    """HEIC or AVIF by its brands: the main one, or those that a general container is compatible with."""
    n_bytes = min(int.from_bytes(content[:4], "big"), MAX_BRANDS_BYTES)
    brands = [content[8:12], *(content[at : at + 4] for at in range(16, n_bytes - 3, 4))]
    for names, kind in ((HEIC_BRANDS, "HEIC"), (AVIF_BRANDS, "AVIF")):
        if brands[0] in names:
            return kind
    if brands[0] in HEIF_CONTAINERS:
        return "AVIF" if any(b in AVIF_BRANDS for b in brands) else "HEIC"
    return FILMS.get(brands[0])

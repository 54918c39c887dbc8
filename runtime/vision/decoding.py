"""An image file's bytes -> a decoded picture, within a bound of time and memory that is checked beforehand.

Knows which formats are opened and Pillow's decoders; no preprocessing. A file's structure is read by
containers/, one module a format, so that Pillow only ever sees what the pixels need.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

from pocketllava.errors import ImageError
from pocketllava.vision.containers import exif, signatures
from pocketllava.vision.containers.encoded import Encoded, Refused

MAX_PIXELS = 50_000_000
BYTES_PER_PIXEL = 8  # of max_pixels: 400 MB
NS_PER_PIXEL = 32  # of max_pixels: 1.6 s, which leaves 0.4 s to resize
WIDE_MODES, WIDE_NS = ("I", "F"), 36  # 32-bit values, which are brought to 8 bits in numpy
HEIF_BYTES, HEIF_NS = 16, 64  # of a pixel: two planes of 16 bits at most, RGBA, and Pillow's copies
MAX_HEIF_BYTES = 64 << 20


def open_encoded(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, int | None]:
    """(the decoded picture as it is stored, its EXIF orientation). Raises ImageError."""
    with pillow_errors(name):
        image, orientation = open_header(content, name, max_pixels)
        image.load()
    return image, orientation


def open_header(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, int | None]:
    """(the picture before it is decoded, its EXIF orientation). Raises ImageError.

    Formats beside the six need a decoder that is not always there: AVIF Pillow's own, HEIC the extra `heic`.
    """
    with pillow_errors(name):
        read = signatures.reader_of(content)
        encoded = read(content) if read else _heif(content, name)
        image = _opened(encoded)
        check_size(image.size, name, max_pixels)
        _check_cost(encoded, image, len(content), name, max_pixels)
        orientation = exif.orientation(encoded.exif, encoded.xmp)
        if encoded.format == "AVIF":  # libavif's own rotation is in the EXIF that Pillow gives
            orientation = exif.orientation(image.info.get("exif", b""), image.info.get("xmp", b""))
    return image, orientation


def check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Raise ImageError for a picture of no pixels or of more than max_pixels."""
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} = {width * height / 1e6:.3g} megapixels, expected at most"
            f" {max_pixels / 1e6:.3g}; scale it down or raise max_pixels (--max-pixels)"
        )
    if width * height == 0:
        raise ImageError(f"{name}: {width} x {height} pixels, expected at least one")


@contextmanager
def pillow_errors(name: str) -> Iterator[None]:
    """Whatever Pillow's decoders raise inside the block is an ImageError; their remarks on metadata are not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Refused as error:
        raise ImageError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: more pixels than Pillow opens ({error})") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: a damaged image (its header is not whole)") from error
    except (
        OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, TypeError, MemoryError
    ) as error:  # fmt: skip
        raise ImageError(f"{name}: a damaged image ({error})") from error


def _opened(encoded: Encoded) -> Image.Image:
    if encoded.format != "HEIF":
        return Image.open(io.BytesIO(encoded.data), formats=[encoded.format])
    from pillow_heif import HeifImageFile

    image: Image.Image = HeifImageFile(io.BytesIO(encoded.data))
    return image


def _heif(content: bytes, name: str) -> Encoded:
    """An AVIF or HEIC file, where there is a decoder for it. Raises ImageError naming what it is instead."""
    kind = signatures.other_name(content)
    expected = f"expected one of {', '.join(signatures.FORMATS)}"
    if kind is None:
        raise ImageError(f"{name}: {len(content)} bytes that are not an image; {expected}")
    if kind == "HEIC" and not _can_open_heic():
        raise ImageError(f'{name}: HEIC, {expected}; pip install "pocketllava[heic]" or save it as JPEG')
    if kind == "AVIF" and not _can_open_avif():
        raise ImageError(f"{name}: AVIF, {expected}; upgrade Pillow or save it as JPEG")
    if kind not in ("HEIC", "AVIF"):
        raise ImageError(f"{name}: {kind}, {expected}; save it as one of them")
    if len(content) > MAX_HEIF_BYTES:
        raise ImageError(f"{name}: {kind} of {len(content)} bytes, expected at most {MAX_HEIF_BYTES}")
    pillow_name = "HEIF" if kind == "HEIC" else "AVIF"
    return Encoded(format=pillow_name, kind=kind, data=content, pixel_bytes=HEIF_BYTES, pixel_ns=HEIF_NS)


def _can_open_heic() -> bool:
    try:
        import pillow_heif
    except ImportError:
        return False
    return hasattr(pillow_heif, "HeifImageFile")


def _can_open_avif() -> bool:
    from PIL import features

    return "avif" in features.modules and bool(features.check("avif"))


def _check_cost(encoded: Encoded, image: Image.Image, n_bytes: int, name: str, max_pixels: int) -> None:
    """Raise ImageError for what would take more memory or time than the largest plain picture may."""
    n_pixels, most_pixels = image.width * image.height, max(max_pixels, MAX_PIXELS)
    copies = 1 if len(encoded.data) == n_bytes else 2
    planes = 0 if image.mode in ("RGB", "L") else 3  # bytes of a pixel that is converted to three bands
    takes_bytes = copies * n_bytes + encoded.fixed_bytes + n_pixels * (encoded.pixel_bytes + planes)
    takes_ns = encoded.fixed_ns + n_pixels * (encoded.pixel_ns + (WIDE_NS if image.mode in WIDE_MODES else 0))
    if takes_bytes > most_pixels * BYTES_PER_PIXEL:
        takes, limit = f"{takes_bytes / 1e6:.0f} MB", f"{most_pixels * BYTES_PER_PIXEL / 1e6:.0f} MB"
    elif takes_ns > most_pixels * NS_PER_PIXEL:
        takes, limit = f"{takes_ns / 1e9:.1f} s", f"{most_pixels * NS_PER_PIXEL / 1e9:.1f} s"
    else:
        return
    raise ImageError(
        f"{name}: {encoded.kind} of {image.width} x {image.height} pixels, which takes about {takes} to decode,"
        f" expected at most {limit}; save it as a plain JPEG, scale it down, or raise max_pixels (--max-pixels)"
    )

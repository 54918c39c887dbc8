"""What a stranger sends as a picture takes bounded time and memory; tests/attack/pictures.py measures all of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import hostile_pictures as hostile
import numpy as np
import pictures
import pytest
from attack import pictures as measured
from PIL import Image, ImageOps

from pocketllava import ImageError
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.vision import image
from pocketllava.vision.containers import exif
from pocketllava.vision.image import load
from pocketllava.vision.image_processor import ImageProcessor

SLOW_TO_BUILD = ("noisy", "49 megapixels", "36 megapixels", "40 megapixels", "65,535", "one row")
QUICK = [name for name in hostile.HOSTILE if not any(word in name for word in SLOW_TO_BUILD)]
LINUX = sys.platform == "linux"


@pytest.mark.parametrize("name", [*QUICK, *measured.QUICK_ARRAYS])
def test_time_and_memory_are_bounded(name: str) -> None:
    source = measured.ARRAYS[name]() if name in measured.ARRAYS else hostile.HOSTILE[name]()
    processor = ImageProcessor(Preprocessing(pad_to_square=len(name) % 2 == 0), grid=24)
    if LINUX:
        measured.warm(processor)
    before, start = measured.peak_mb() if LINUX else 0.0, time.process_time()
    try:
        processor.process(source)
    except ImageError as error:
        assert len(str(error)) < 400
    assert time.process_time() - start < 2 * measured.MAX_S  # twice for a machine that others use too
    if LINUX:
        assert measured.peak_mb() - before < measured.MAX_MB


def with_exif(kind: str, value: int, picture: Image.Image) -> bytes:
    """A file with an orientation."""
    body = b"Exif\0\0" + hostile.tiff([hostile.short(exif.ORIENTATION, value)])
    return hostile.encoded(picture, kind, exif=body)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_every_side_up_in_strips(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that is worked on in many strips is the picture that Pillow turns at once."""
    if kind == "JPEG" and mode == "RGBA":
        return
    if kind == "AVIF" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    monkeypatch.setattr("pocketllava.vision.image.STRIP_PIXELS", 7 * 60)
    for value in range(10):
        data = with_exif(kind, value, pictures.scene(60, 45).convert(mode))
        upright = ImageOps.exif_transpose(hostile.opened(data))
        white = Image.new("RGBA", upright.size, "white")
        expected = Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
        assert np.array_equal(np.asarray(load(data)), np.asarray(expected)), value


@pytest.mark.parametrize("resample", range(6))
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("size", [(350, 60), (60, 350), (336, 336), (20, 31), (400, 399)])
def test_resizing_by_bands_is_resizing(
    resample: int, pad: bool, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in every filter, turned or not, padded or not, against one call of Pillow's resize in RGB."""
    monkeypatch.setattr("pocketllava.vision.image.STRIP_PIXELS", 5000)
    monkeypatch.setattr("pocketllava.vision.image.WHOLE_PIXELS", 0)  # of a canvas that is resized at once
    steps = Preprocessing(resample=resample, pad_to_square=pad)
    for mode, orientation in (("RGB", 1), ("RGB", 2), ("RGB", 6), ("L", 1), ("RGBA", 6), ("P", 2)):
        picture = pictures.scene(*size).convert(mode)
        turn = image.TURNS.get(orientation)
        whole = picture.convert("RGB") if turn is None else picture.convert("RGB").transpose(turn)
        if pad:
            side, upright = max(size), whole
            whole = Image.new("RGB", (side, side), tuple(int(255 * m) for m in steps.mean))
            whole.paste(upright, ((side - upright.width) // 2, (side - upright.height) // 2))
        longer = int(336 * max(whole.size) / min(whole.size))
        target = (336, longer) if whole.width <= whole.height else (longer, 336)
        resized = whole.resize(target, Image.Resampling(resample))
        left, top = (resized.width - 336) // 2, (resized.height - 336) // 2
        expected = np.asarray(resized.crop((left, top, left + 336, top + 336)))
        pixels = image.resize_and_crop(image.Picture.of(picture, orientation), steps)
        assert np.array_equal(pixels, expected), (mode, orientation)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300), r"HEIC.*pip install|a damaged image"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(30), r"JPEG 2000, expected one of PNG, JPEG"),
        (b"\0\0\1\0" + bytes(30), r"an ICO icon"),
        (b"\0\0\0\x14ftypqt  " + bytes(30), r"a QuickTime film"),
        (b"\x1aE\xdf\xa3" + bytes(99), r"a WebM or Matroska film"),
        (b"%PDF-1.7\n", r"a PDF document"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', r"an SVG drawing"),
        (b" <!DOCTYPE html><html>404</html>", r"a web page"),
        (b"P6 9 9 255\n" + bytes(243), r"a PNM picture"),
        (b"8BPS\0\1" + bytes(30), r"a Photoshop document"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(30), r"a damaged image|AVIF"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    """By what is in the file; its name says .jpg."""
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(ImageError, match=message):
        load(tmp_path / "a.jpg")


def test_avif_where_pillow_has_it() -> None:
    if ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    data = hostile.encoded(pictures.scene(60, 40), "AVIF")
    assert np.array_equal(np.asarray(load(data)), np.asarray(hostile.opened(data).convert("RGB")))


def test_heic_by_the_extra() -> None:
    heif = pytest.importorskip("pillow_heif")
    registered = dict(Image.OPEN)
    picture = pictures.scene(64, 48)
    buffer = heif.from_pillow(picture)
    data = hostile.saved(buffer)
    read = np.asarray(load(data)).astype(int)
    assert np.abs(read - np.asarray(picture)).mean() < 12  # lossy
    assert registered == Image.OPEN  # nothing is registered with the user's Pillow

"""Images of every kind -> the same pixels as the reference, or one line that says why not."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import recorded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pocketllava.errors import ImageError
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.vision.image import Picture, load, preprocess, resize_and_crop

CLIP = Preprocessing()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """As a file of that format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pixels_equal_the_recorded_reference() -> None:
    found = {
        name: hashlib.sha256(preprocess(data, CLIP).tobytes()).hexdigest()
        for name, data in pictures.twelve().items()
    }
    assert found == recorded.load()["pixels"]


def test_every_way_to_give_an_image(tmp_path: Path) -> None:
    picture = pictures.scene(300, 200)
    data = encoded(picture, "PNG")
    (tmp_path / "a b.png").write_bytes(data)
    expected = preprocess(picture, CLIP)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (
        data,
        bytearray(data),
        tmp_path / "a b.png",
        str(tmp_path / "a b.png"),
        uri,
        np.asarray(picture),
    ):
        assert np.array_equal(preprocess(source, CLIP), expected)  # type: ignore[arg-type]


def test_half_precision_arrays_are_computed_as_numpy_does() -> None:
    halves = np.arange(0x3C01, dtype=np.uint16).view(np.float16)  # all from 0 to 1
    array = np.resize(np.concatenate([halves, [np.float16(-0.0)]]).astype(np.float16), (124, 124, 3))
    expected = np.rint(array * np.float16(255)).astype(np.uint8)
    assert np.array_equal(np.asarray(load(array)), expected)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_agree(kind: str) -> None:
    picture = pictures.scene(90, 70)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(preprocess(encoded(picture, kind, **options), CLIP), preprocess(picture, CLIP))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honored(orientation: int) -> None:
    upright = pictures.scene(80, 60)
    turns = {
        1: [],
        2: [0],
        3: [3],
        4: [1],
        5: [5],
        6: [2],
        7: [6],
        8: [4],
    }  # what undoes each, as Transpose codes
    stored = upright
    for code in turns[orientation]:
        stored = stored.transpose(Image.Transpose(code))
    assert np.array_equal(np.asarray(load(pictures.rotated(stored, orientation))), np.asarray(upright))


def test_transparency_lies_on_white() -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    half = Image.new("RGBA", (40, 40), (255, 0, 0, 128))
    assert load(encoded(clear, "PNG")).getpixel((5, 5)) == (255, 255, 255)
    assert load(encoded(half, "PNG")).getpixel((5, 5)) == (255, 127, 127)
    palette = Image.new("P", (40, 40), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert load(encoded(palette, "PNG", transparency=0)).getpixel((5, 5)) == (255, 255, 255)
    assert load(encoded(clear.convert("LA"), "PNG")).getpixel((5, 5)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 40 * 40).astype(np.uint16).reshape(40, 40)
    grey = np.asarray(load(encoded(Image.fromarray(ramp), "PNG")))[:, :, 0]
    assert np.abs(grey.astype(int) - np.rint(ramp / 257).astype(int)).max() <= 1
    assert np.array_equal(np.asarray(load(ramp))[:, :, 0], grey)


def test_cmyk_and_the_first_frame() -> None:
    red = load(encoded(Image.new("RGB", (30, 30), (255, 0, 0)).convert("CMYK"), "JPEG")).getpixel((3, 3))
    assert red[0] > 200  # type: ignore[index]
    assert max(red[1:]) < 60  # type: ignore[index]
    frames = [Image.new("RGB", (30, 30), color) for color in ("red", "blue")]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load(animated).getpixel((3, 3)) == (255, 0, 0)


def test_arrays() -> None:
    picture = pictures.scene(50, 40)
    whole = np.asarray(picture)
    assert np.array_equal(np.asarray(load(whole / 255)), whole)
    assert np.asarray(load(whole[:, :, 0])).shape == (40, 50, 3)
    for bad in (
        np.zeros((3, 40, 50), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
        np.full((4, 4), 7.0),
        np.zeros((4, 4), int),
    ):
        with pytest.raises(ImageError, match=r"^array: "):
            load(bad)


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises that size; a few bytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", r"0 bytes that are not an image"),
        (b"hello, world", r"12 bytes that are not an image; expected one of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"PostScript, expected one of PNG, JPEG"),
        (huge_png(40_000, 40_000), r"pixels"),
        (huge_png(9_000, 9_000), r"9000 x 9000 = 81 megapixels, expected at most 50"),
        (huge_png(100, 100), r"a damaged image"),
        ("no/such/file.png", r"no/such/file.png: cannot be read \(No such file or directory\)"),
        ("http://localhost/a.png", r"http URL: not opened"),
        ("FILE:///etc/passwd", r"FILE URL: not opened"),
        ("data:image/png,abc", r"data URI: expected data:image"),
        ("data:image/png;base64,%%%", r"data URI: not base64"),
        (17, r"found int, expected a path"),
    ],
)
def test_what_is_no_image_is_one_line(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_larger_images_on_request() -> None:
    big = encoded(Image.new("1", (10_000, 6_000)), "PNG")
    with pytest.raises(ImageError, match=r"60 megapixels"):
        load(big)
    assert load(big, max_pixels=60_000_000).size == (10_000, 6_000)


def test_lines_of_pixels_are_refused() -> None:
    with pytest.raises(ImageError, match=r"5000 x 1 pixels, expected sides of at most 200:1"):
        resize_and_crop(Picture.of(Image.new("RGB", (5000, 1))), CLIP)


@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
def test_damaged_files_end_as_image_errors(data: st.DataObject, kind: str) -> None:
    whole = bytearray(encoded(pictures.scene(40, 30), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        assert load(cut, max_pixels=1_000_000).mode == "RGB"
    except ImageError as error:
        assert "\n" not in str(error)

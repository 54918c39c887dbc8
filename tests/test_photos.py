"""A picture of a conversation is read and decoded once; what is remembered is never another picture's."""

from __future__ import annotations

import base64
import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pocketllava import ImageError
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.vision.image import preprocess
from pocketllava.vision.image_processor import ImageProcessor

LONG_AGO = time.time() - 100


def settled(path: Path, seconds: float = LONG_AGO) -> Path:
    """A file as it looks when nobody has touched it for a while."""
    os.utime(path, (seconds, seconds))
    return path


def saved(path: Path, color: str, seconds: float = LONG_AGO) -> Path:
    Image.new("RGB", (40, 30), color).save(path)
    return settled(path, seconds)


@pytest.fixture
def processor() -> ImageProcessor:
    return ImageProcessor(Preprocessing(), grid=24, encoder="an encoder")


def test_a_photo_is_decoded_once(processor: ImageProcessor, tmp_path: Path) -> None:
    path = saved(tmp_path / "photo.png", "red")
    first = processor.process(path)
    assert processor.process(path) is first
    assert processor.process(str(path)) is first
    moment = path.stat().st_atime_ns
    path.chmod(0o000)  # a remembered file is not even opened (root may open it all the same)
    assert processor.process(path) is first
    assert path.stat().st_atime_ns == moment


def test_the_same_bytes_from_anywhere_are_the_same_picture(processor: ImageProcessor, tmp_path: Path) -> None:
    path = saved(tmp_path / "photo.png", "red")
    data = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    copy = settled(Path(tmp_path / "copy.png")) if (tmp_path / "copy.png").write_bytes(data) else path
    first = processor.process(path)
    with path.open("rb") as file:
        for source in (data, bytearray(data), uri, copy, io.BytesIO(data), file, file):
            assert processor.process(source) is first
            assert processor.digest(source) == processor.digest(path)


def test_equal_pixels_are_the_same_picture_whatever_held_them(processor: ImageProcessor) -> None:
    array = np.asarray(pictures.scene(50, 40))
    keys = {processor.process(s).key for s in (array, array.copy(), Image.fromarray(array))}
    keys.add(processor.process(pictures.png(Image.fromarray(array))).key)
    assert len(keys) == 1


def test_a_file_that_changed_is_read_again(processor: ImageProcessor, tmp_path: Path) -> None:
    path = saved(tmp_path / "photo.png", "red")
    red = processor.process(path)
    saved(path, "blue", LONG_AGO + 10)
    blue = processor.process(path)
    assert blue.key != red.key
    other = saved(tmp_path / "other.png", "lime", LONG_AGO + 10)
    other.replace(path)  # the same size and time of change, another inode
    assert processor.process(path).key not in (red.key, blue.key)
    saved(path, "red")
    assert processor.process(path) is red


def test_a_file_that_changes_right_now_is_never_taken_for_its_past(
    processor: ImageProcessor, tmp_path: Path
) -> None:
    """Within one tick of the clock a file's state looks the same before and after it was written."""
    path, now = tmp_path / "photo.png", time.time()
    seen = [processor.process(saved(path, color, now)).key for color in ("red", "lime", "blue", "red")]
    assert len(set(seen)) == 3
    assert seen[0] == seen[3]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["red", "lime", "blue"])), max_size=12)
)
def test_any_order_of_writing_and_showing(tmp_path: Path, script: list[tuple[str, str]]) -> None:
    processor, moment = ImageProcessor(Preprocessing(), grid=24), LONG_AGO
    for name, color in script:
        moment += 0.01
        path = saved(tmp_path / f"{name}.png", color, moment)
        assert np.array_equal(processor.process(path).tiles[0], preprocess(path, Preprocessing()))


def test_many_pictures_are_forgotten_in_turn(processor: ImageProcessor) -> None:
    first = processor.process(np.zeros((4, 4, 3), np.uint8))
    for n in range(1, 200):
        processor.process(np.full((4, 4, 3), n, np.uint8))
    again = processor.process(np.zeros((4, 4, 3), np.uint8))
    assert again is not first
    assert again.key == first.key


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_refused_at_once(processor: ImageProcessor, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ImageError, match="cannot be read"):
            processor.process(path)
        assert processor.digest(path) is None


class NotSeekable(io.RawIOBase):
    """A socket's file."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._data.read(size)


def test_open_files(processor: ImageProcessor) -> None:
    data = pictures.png(pictures.scene(50, 40))
    expected = processor.process(data)
    assert processor.process(NotSeekable(data)) is expected
    closed: Any = io.BytesIO(data)
    closed.close()
    for bad in (io.StringIO("text"), closed):
        with pytest.raises(ImageError, match="image file: "):
            processor.process(bad)


def test_odd_metadata_changes_nothing_but_the_orientation(processor: ImageProcessor) -> None:
    """Tags of wrong types, as cameras and editors write them: only the orientation is read, nothing is rewritten."""
    picture = pictures.scene(50, 40)
    plain = processor.process(pictures.png(picture))
    exif = Image.Exif()
    exif[0x0112], exif[0x9286], exif[0x010F] = 6, "a comment", b"\xff\xfe"
    data = io.BytesIO()
    picture.save(data, "PNG", exif=exif)
    turned = processor.process(data.getvalue())
    assert np.array_equal(
        turned.tiles[0], preprocess(picture.transpose(Image.Transpose.ROTATE_270), Preprocessing())
    )
    assert turned.key != plain.key
    for damaged in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 40):
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=100, exif=damaged)
        assert processor.process(data.getvalue()).tiles[0].shape == (336, 336, 3)

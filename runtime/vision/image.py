"""Path, bytes, PIL image, array or data URI -> upright RGB -> (336, 336, 3) uint8, as the checkpoint's processor does.

Knows modes, orientations and a checkpoint's Preprocessing; no model, no file format. Turning and converting work on a
few rows at a time, and resizing on one band, so that a large picture is in memory little more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pocketllava.errors import ImageError
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.types import ImageSource
from pocketllava.vision import sources
from pocketllava.vision.decoding import MAX_PIXELS, check_size, open_encoded, open_header, pillow_errors

MAX_PADDED_PIXELS = 200_000_000  # of the square that a long picture is padded to
MAX_ASPECT = 200  # beyond it, resizing the short side to 336 would make gigapixels
MAX_RESIZED_PIXELS = 45_000_000  # after each of the two passes of resizing, together: 180 MB
STRIP_PIXELS = 1 << 18  # worked on at once
WHOLE_PIXELS = 16 << 20  # of a canvas that is resized in RGB
BACKGROUND = (255, 255, 255)  # what shows through transparency
WHITE_16, WHITE_8, WHITE_1 = 65535, 255, 1  # the largest value of a mode of more than 8 bits, as it is used
ARRAY_TYPES = (np.uint8, np.uint16, np.floating)

SIXTEEN_BIT = WHITE_16 // WHITE_8  # 257
FROM_16_BITS = np.rint(np.arange(WHITE_16 + 1) / SIXTEEN_BIT).astype(np.uint8)

T = Image.Transpose
TURNS = {  # EXIF orientation -> what makes it upright
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_270,
    7: T.TRANSVERSE,
    8: T.ROTATE_90,
}
LYING = (T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90)  # rows are columns
FROM_THE_END = (T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSVERSE, T.ROTATE_90)  # the first row is the last one

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Picture:
    """A decoded picture, shown upright and in RGB a few rows at a time.

    stored: (width, height) before it is turned. part: a box of it, in RGB.
    """

    stored: tuple[int, int]
    part: Callable[[Box], Image.Image]
    turn: Image.Transpose | None = None

    @classmethod
    def of(cls, image: Image.Image, orientation: int | None = None) -> Picture:
        """A loaded image of any mode."""
        white = _white(image) if image.mode.startswith("I") or image.mode == "F" else WHITE_8
        return cls(image.size, lambda box: to_rgb(image.crop(box), white), TURNS.get(orientation or 0))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright."""
        return self.stored[::-1] if self.turn in LYING else self.stored

    def rows(self, top: int, bottom: int) -> Image.Image:
        """Some of its rows, RGB."""
        width, height = self.stored
        end = self.size[1]
        first, last = (end - bottom, end - top) if self.turn in FROM_THE_END else (top, bottom)
        box = (first, 0, last, height) if self.turn in LYING else (0, first, width, last)
        strip = self.part(box)
        return strip if self.turn is None else strip.transpose(self.turn)

    def strips(self) -> Iterator[tuple[int, Image.Image]]:
        """All rows in order, each strip with the number of its first one."""
        width, height = self.size
        n_rows = max(1, STRIP_PIXELS // width)
        for top in range(0, height, n_rows):
            yield top, self.rows(top, min(top + n_rows, height))


def preprocess(source: ImageSource, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode an image and bring it to the model's input: (crop_size, crop_size, 3) uint8, RGB.

    Equals transformers' CLIPImageProcessor (LlavaImageProcessor with padding), Pillow back end, before
    rescaling and normalizing. Raises ImageError.
    """
    return prepare(sources.read(source), sources.name_of(source), preprocessing, max_pixels)


def load(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to an upright RGB picture: first frame, EXIF orientation applied, transparency on white."""
    name = sources.name_of(source)
    with pillow_errors(name):
        picture = decode(sources.read(source), name, max_pixels)
        image = Image.new("RGB", picture.size)
        for top, strip in picture.strips():
            image.paste(strip, (0, top))
    return image


def prepare(
    content: sources.Content, name: str, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS
) -> Pixels:
    """preprocess() of what sources.read() gave; `name` is what errors call it."""
    with pillow_errors(name):
        return resize_and_crop(decode(content, name, max_pixels), preprocessing)


def decode(content: sources.Content, name: str, max_pixels: int = MAX_PIXELS) -> Picture:
    """What sources.read() gave, decoded and not converted yet."""
    check_pixels(content, name, max_pixels)
    if isinstance(content, np.ndarray):
        return _of_array(content)
    if isinstance(content, Image.Image):
        content.load()  # first: Pillow 13 turns a TIFF then, and takes the tag away
        return Picture.of(content, sources.orientation_of(content))
    return Picture.of(*open_encoded(content, name, max_pixels))


def check_pixels(content: sources.Content, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError for a picture of more than max_pixels or an array of no picture, before any of it is copied."""
    if isinstance(content, Image.Image):
        check_size(content.size, name, max_pixels)
    elif isinstance(content, np.ndarray):
        shape = content.shape[:2] if content.shape[2:] in ((1,), (3,), (4,)) else content.shape
        if len(shape) != 2 or not content.size:
            raise ImageError(f"array: shape {content.shape}, expected (H, W), (H, W, 3) or (H, W, 4)")
        if not any(np.issubdtype(content.dtype, kind) for kind in ARRAY_TYPES):
            raise ImageError(f"array: {content.dtype}, expected uint8, uint16, or floats from 0 to 1")
        check_size((shape[1], shape[0]), name, max_pixels)


def size_of(content: sources.Content, name: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of what sources.read() gave, upright; of a file only the header is read. Raises ImageError."""
    check_pixels(content, name, max_pixels)
    if isinstance(content, np.ndarray):
        return content.shape[1], content.shape[0]
    with pillow_errors(name):
        if isinstance(content, Image.Image):
            content.load()
            size, orientation = content.size, sources.orientation_of(content)
        else:
            image, orientation = open_header(content, name, max_pixels)
            size = image.size
    return size[::-1] if TURNS.get(orientation or 0) in LYING else size


def to_rgb(image: Image.Image, white: int) -> Image.Image:
    """Any Pillow mode -> RGB: 16-bit values scaled (convert() would clip them), transparency on white.

    white: of modes I and F, the value that becomes 255.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if values.dtype.itemsize != 2:
            values = np.nan_to_num(values.astype(np.float64))
            values = values.clip(0, white, out=values)
        return Image.fromarray(_eight_bits(values, white)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), upper).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_and_crop(picture: Picture, preprocessing: Preprocessing) -> Pixels:
    """RGB picture -> (crop_size, crop_size, 3) uint8, in the steps of CLIPImageProcessor."""
    width, height = picture.size
    if preprocessing.pad_to_square:
        width = height = _padded_side(width, height)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"image: {width} x {height} pixels, expected sides of at most {MAX_ASPECT}:1; crop it"
        )
    size = (preprocessing.crop_size, preprocessing.crop_size)
    if (edge := preprocessing.shortest_edge) is not None:
        short, long = sorted((width, height))
        longer = int(edge * long / short)  # transformers' get_resize_output_image_size
        size = (edge, longer) if width <= height else (longer, edge)
    if size[0] * (height + size[1]) > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"image: {width} x {height} pixels, resized to {size[0]} x {size[1]}, expected at most"
            f" {MAX_RESIZED_PIXELS / 1e6:.0f} megapixels on the way there; crop or scale it"
        )
    filling = tuple(int(255 * m) for m in preprocessing.mean)
    resized = resize(picture, size, preprocessing.resample, canvas=(width, height), filling=filling)
    return _center_crop(np.asarray(resized), preprocessing.crop_size)


def resize(
    picture: Picture,
    size: tuple[int, int],
    resample: int,
    *,
    canvas: tuple[int, int] | None = None,
    filling: tuple[int, ...] = (0, 0, 0),
) -> Image.Image:
    """The picture, centered on a canvas of a color if there is one, resized; sizes are (width, height), RGB.

    Pillow resizes by rows and by columns, rounding in between, and which comes first is its own choice: so it gets all
    of a canvas at once, a large one band by band, each a quarter of RGB's memory.
    """
    canvas, kind = canvas or picture.size, Image.Resampling(resample)
    left, above = ((whole - part) // 2 for whole, part in zip(canvas, picture.size, strict=True))
    if canvas[0] * canvas[1] <= WHOLE_PIXELS:
        whole = Image.new("RGB", canvas, filling)
        for top, strip in picture.strips():
            whole.paste(strip, (left, above + top))
        return whole.resize(size, resample=kind)
    bands = []
    for band, color in enumerate(filling):
        plane = Image.new("L", canvas, color)
        for top, strip in picture.strips():
            plane.paste(strip.getchannel(band), (left, above + top))
        bands.append(plane.resize(size, resample=kind))
    return Image.merge("RGB", bands)


def _center_crop(pixels: Pixels, crop: int) -> Pixels:
    """transformers' center_crop: odd margins give the smaller half to top and left; black outside."""
    height, width = pixels.shape[:2]
    if height < crop or width < crop:
        canvas = np.zeros((max(height, crop), max(width, crop), 3), np.uint8)
        top, left = -(-(canvas.shape[0] - height) // 2), -(-(canvas.shape[1] - width) // 2)
        canvas[top : top + height, left : left + width] = pixels
        pixels, (height, width) = canvas, canvas.shape[:2]
    top, left = (height - crop) // 2, (width - crop) // 2
    return np.ascontiguousarray(pixels[top : top + crop, left : left + crop])


def _padded_side(width: int, height: int) -> int:
    """The side of the square on which the original LLaVA code centers a picture (expand2square)."""
    side = max(width, height)
    if side * side > MAX_PADDED_PIXELS:
        raise ImageError(
            f"image: {width} x {height} pixels, padded to a square of {side} x {side}, expected at most"
            f" {MAX_PADDED_PIXELS / 1e6:.0f} megapixels; crop or scale it"
        )
    return side


def _of_array(array: npt.NDArray[np.generic]) -> Picture:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, uint16 (scaled), or floats from 0 to 1."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    white = {np.dtype(np.uint8): WHITE_8, np.dtype(np.uint16): WHITE_16}.get(array.dtype, WHITE_1)
    if white == WHITE_1 and not (array.min() >= 0 and array.max() <= 1):
        raise ImageError(f"array: {array.dtype}, expected uint8, uint16, or floats from 0 to 1")

    def part(box: Box) -> Image.Image:
        left, top, right, bottom = box
        values = array[top:bottom, left:right]
        if values.dtype == np.uint8:
            return to_rgb(Image.fromarray(np.ascontiguousarray(values)), WHITE_8)
        return to_rgb(Image.fromarray(_eight_bits(np.ascontiguousarray(values), white)), WHITE_8)

    return Picture((array.shape[1], array.shape[0]), part)


def _white(image: Image.Image) -> int:
    """The value of modes I and F that is white: 65535 in 16 bits or beyond 255, 1 for floats up to 1."""
    n_rows, most = max(1, STRIP_PIXELS // image.width), 0.0
    for top in range(0, image.height, n_rows):
        values = np.asarray(image.crop((0, top, image.width, min(top + n_rows, image.height))))
        if values.dtype.itemsize == 2:
            return WHITE_16
        most = max(most, float(np.fmax.reduce(values, axis=None, initial=0)))  # NaN counts as 0
    if most > WHITE_8:
        return WHITE_16
    return WHITE_1 if image.mode == "F" and most <= WHITE_1 else WHITE_8


def _eight_bits(values: npt.NDArray[Any], white: int) -> Pixels:
    """Values from 0 to white, as 0 to 255."""
    if values.dtype.itemsize == 2 and values.dtype.kind == "u":
        eight: Pixels = FROM_16_BITS[values]
        return eight
    v: npt.NDArray[Any] = values / SIXTEEN_BIT if white == WHITE_16 else values * (WHITE_8 // white)
    np.rint(v, out=v)
    return v.astype(np.uint8)

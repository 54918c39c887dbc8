"""Path, bytes, PIL image, array or data URI -> upright RGB -> (336, 336, 3) uint8, as the checkpoint's processor does.

Knows modes, orientations and a checkpoint's Preprocessing; no model, no file format. What is not RGB or gray is
converted a few rows at a time, and what is large and turned or padded is resized band by band: a large picture is in
memory little more than once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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

MAX_PADDED_PIXELS = 100_000_000  # of the square that a long picture is padded to
MAX_ASPECT = 200  # beyond it, resizing the short side to 336 would make gigapixels
MAX_RESIZED_PIXELS = 45_000_000  # after each of the two passes of resizing, together: 180 MB
STRIP_PIXELS = 1 << 17  # worked on at once
WHOLE_PIXELS = 16 << 20  # of a canvas that is resized in RGB
BACKGROUND = (255, 255, 255)  # what shows through transparency
WHITE_16, WHITE_8, WHITE_1 = 65535, 255, 1  # the largest value of a mode of more than 8 bits, as it is used
ARRAY_TYPES = (np.uint8, np.uint16, np.floating)

SIXTEEN_BIT = WHITE_16 // WHITE_8  # 257
FROM_16_BITS = np.rint(np.arange(WHITE_16 + 1) / SIXTEEN_BIT).astype(np.uint8)
ONE_16 = int(np.array(1, np.float16).view(np.uint16))  # bits of halves from 0 to 1 are 0 to this

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

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Picture:
    """A decoded picture that is shown upright, in RGB or band by band.

    stored: an image in RGB or gray, or three in gray, one a band, as they were before turning.
    """

    stored: tuple[Image.Image, ...]
    turn: Image.Transpose | None = None

    @classmethod
    def of(cls, image: Image.Image, orientation: int | None = None) -> Picture:
        """A loaded image of any mode."""
        turn = TURNS.get(orientation or 0)
        if image.mode in ("RGB", "L") and "transparency" not in image.info:
            return cls((image,), turn)
        white = _white(image) if image.mode.startswith("I") or image.mode == "F" else WHITE_8
        return cls(_planes(image.size, lambda box: to_rgb(image.crop(box), white)), turn)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright."""
        size = self.stored[0].size
        return size[::-1] if self.turn in LYING else size

    def rgb(self) -> Image.Image:
        """All of it."""
        image = self.stored[0] if len(self.stored) == 1 else Image.merge("RGB", self.stored)
        return self._upright(image if image.mode == "RGB" else image.convert("RGB"))

    def band(self, number: int) -> Image.Image:
        """Red, green or blue, in gray."""
        image = self.stored[number if len(self.stored) > 1 else 0]
        return self._upright(image.getchannel(number) if image.mode == "RGB" else image)

    def _upright(self, image: Image.Image) -> Image.Image:
        return image if self.turn is None else image.transpose(self.turn)


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
        return picture.rgb().copy()


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
    of a canvas at once: a large one that has to be turned or padded band by band, each a quarter of RGB's memory.
    """
    canvas, kind = canvas or picture.size, Image.Resampling(resample)
    place = ((canvas[0] - picture.size[0]) // 2, (canvas[1] - picture.size[1]) // 2)
    if canvas == picture.size and picture.turn is None and len(picture.stored) == 1:
        return picture.stored[0].resize(size, resample=kind).convert("RGB")
    if canvas[0] * canvas[1] <= WHOLE_PIXELS:
        return _on_canvas(picture.rgb(), canvas, place, filling).resize(size, resample=kind)
    bands = [
        _on_canvas(picture.band(n), canvas, place, color).resize(size, resample=kind)
        for n, color in enumerate(filling)
    ]
    return Image.merge("RGB", bands)


def _on_canvas(
    image: Image.Image, canvas: tuple[int, int], place: tuple[int, int], color: int | tuple[int, ...]
) -> Image.Image:
    """An image on a larger one of a color; itself if it is as large."""
    if image.size == canvas:
        return image
    whole = Image.new(image.mode, canvas, color)
    whole.paste(image, place)
    return whole


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
    if white == WHITE_1 and not _is_unit(array):
        raise ImageError(f"array: {array.dtype}, expected uint8, uint16, or floats from 0 to 1")

    def part(box: Box) -> Image.Image:
        left, top, right, bottom = box
        values = np.ascontiguousarray(array[top:bottom, left:right])
        return to_rgb(
            Image.fromarray(values if values.dtype == np.uint8 else _eight_bits(values, white)), WHITE_8
        )

    return Picture(_planes((array.shape[1], array.shape[0]), part))


def _is_unit(array: npt.NDArray[Any]) -> bool:
    """Whether floats are from 0 to 1; NaN is not. Halves are compared by their bits, which is ten times as fast."""
    if array.dtype == np.float16 and array.view(np.uint16).max() <= ONE_16:
        return True
    return bool(array.min() >= 0 and array.max() <= 1)


def _planes(size: tuple[int, int], part: Callable[[Box], Image.Image]) -> tuple[Image.Image, ...]:
    """Three bands, in gray, of a picture whose parts are given in RGB: a few rows are converted at a time."""
    planes = tuple(Image.new("L", size) for _ in range(3))
    n_rows = max(1, STRIP_PIXELS // size[0])
    for top in range(0, size[1], n_rows):
        strip = part((0, top, size[0], min(top + n_rows, size[1])))
        for plane, band in zip(planes, strip.split(), strict=True):
            plane.paste(band, (0, top))
    return planes


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
    if values.dtype == np.float16:
        return _from_halves()[values.view(np.uint16)]
    v: npt.NDArray[Any] = values / SIXTEEN_BIT if white == WHITE_16 else values * (WHITE_8 // white)
    np.rint(v, out=v)
    return v.astype(np.uint8)


@functools.cache
def _from_halves() -> Pixels:
    """What each half's bits are in 8 bits, as numpy computes it in halves; sense only from 0 to 1."""
    halves = np.arange(WHITE_16 + 1, dtype=np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        return np.rint(np.nan_to_num(halves) * WHITE_8).clip(0, WHITE_8).astype(np.uint8)

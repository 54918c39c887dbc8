"""Path, bytes, PIL image, array or data URI -> upright RGB -> (336, 336, 3) uint8, as the checkpoint's processor does.

Knows Pillow and a checkpoint's Preprocessing; no model. Pillow decodes, from a list of formats and after
the size in the header was checked; nothing is fetched.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pocketllava.errors import ImageError
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.types import ImageSource
from pocketllava.vision import sources

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 50_000_000
MAX_PADDED_PIXELS = 200_000_000  # of the square that a long picture is padded to: 600 MB
MAX_ASPECT = 200  # beyond it, resizing the short side to 336 would make gigapixels
BACKGROUND = (255, 255, 255)  # what shows through transparency
SIXTEEN_BIT = 257  # 65535 / 255

TURNS = {  # EXIF orientation -> what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = npt.NDArray[np.uint8]


def preprocess(source: ImageSource, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode an image and bring it to the model's input: (crop_size, crop_size, 3) uint8, RGB.

    Equals transformers' CLIPImageProcessor (LlavaImageProcessor with padding), Pillow back end, before
    rescaling and normalizing. Raises ImageError.
    """
    return resize_and_crop(load(source, max_pixels), preprocessing)


def load(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to an upright RGB picture: first frame, EXIF orientation applied, transparency on white."""
    return decode(sources.read(source), sources.name_of(source), max_pixels)


def decode(content: sources.Content, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The same of what sources.read() gave; `name` is what errors call it."""
    check_pixels(content, name, max_pixels)
    with pillow_errors(name):
        if isinstance(content, np.ndarray):
            return to_rgb(_from_array(content))
        if isinstance(content, Image.Image):
            return to_rgb(upright(content))
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ImageError(
                f"{name}: {len(content)} bytes that are not an image; expected one of {', '.join(FORMATS)}"
            ) from error
        _check_size(image.size, name, max_pixels)
        return to_rgb(upright(image))


def check_pixels(content: sources.Content, name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise ImageError for a picture or an array of more than max_pixels, before anything is made of it."""
    if isinstance(content, Image.Image):
        _check_size(content.size, name, max_pixels)
    elif isinstance(content, np.ndarray) and content.size and content.ndim in (2, 3):
        _check_size((content.shape[1], content.shape[0]), name, max_pixels)


def size_of(content: sources.Content, name: str, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) of what sources.read() gave, upright; of a file only the header is read. Raises ImageError."""
    check_pixels(content, name, max_pixels)
    if isinstance(content, np.ndarray):
        return _from_array(content).size
    with pillow_errors(name):
        image = Image.open(io.BytesIO(content), formats=FORMATS) if isinstance(content, bytes) else content
        lies = (sources.orientation_of(image) or 0) >= 5
    return image.size[::-1] if lies else image.size


@contextmanager
def pillow_errors(name: str) -> Iterator[None]:
    """Whatever Pillow's decoders raise inside the block is an ImageError; their remarks on metadata are not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: more pixels than Pillow opens ({error})") from error
    except (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, LookupError, MemoryError) as error:
        raise ImageError(f"{name}: a damaged image ({error})") from error


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says."""
    turn = TURNS.get(sources.orientation_of(image) or 0)
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB: 16-bit values scaled (convert() would clip them), transparency on white."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), upper).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """RGB picture -> (crop_size, crop_size, 3) uint8, in the steps of CLIPImageProcessor."""
    if preprocessing.pad_to_square:
        image = _pad_to_square(image, preprocessing)
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"image: {width} x {height} pixels, expected sides of at most {MAX_ASPECT}:1; crop it"
        )
    size = (preprocessing.crop_size, preprocessing.crop_size)
    if (edge := preprocessing.shortest_edge) is not None:
        short, long = sorted((width, height))
        longer = int(edge * long / short)  # transformers' get_resize_output_image_size
        size = (edge, longer) if width <= height else (longer, edge)
    resized = image.resize(size, resample=Image.Resampling(preprocessing.resample))
    return _center_crop(np.asarray(resized), preprocessing.crop_size)


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


def _pad_to_square(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Center the picture on a square of the mean color: expand2square of the original LLaVA code."""
    side = max(image.size)
    if side * side > MAX_PADDED_PIXELS:
        raise ImageError(
            f"image: {image.width} x {image.height} pixels, padded to a square of {side} x {side}, expected at most"
            f" {MAX_PADDED_PIXELS / 1e6:.0f} megapixels; crop or scale it"
        )
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in preprocessing.mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _from_array(array: npt.NDArray[np.generic]) -> Image.Image:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, uint16 (scaled), or floats from 0 to 1."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"array: shape {array.shape}, expected (H, W), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if array.dtype == np.uint16:
        return Image.fromarray(np.ascontiguousarray(_eight_bits(array)))
    if np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1:
        return Image.fromarray(np.ascontiguousarray(np.rint(array * 255).astype(np.uint8)))
    raise ImageError(f"array: {array.dtype}, expected uint8, uint16, or floats from 0 to 1")


def _eight_bits(values: npt.NDArray[np.generic]) -> Pixels:
    """16-bit values to 8 bits; values that need no more than 8 bits, and floats up to 1, as they look."""
    v = np.nan_to_num(values.astype(np.float64))
    if values.dtype.itemsize == 2 or v.max(initial=0) > 255:
        v = v / SIXTEEN_BIT
    elif np.issubdtype(values.dtype, np.floating) and v.max(initial=0) <= 1:
        v = v * 255
    return np.rint(np.clip(v, 0, 255)).astype(np.uint8)


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} = {width * height / 1e6:.0f} megapixels, expected at most"
            f" {max_pixels / 1e6:.0f}; scale it down or raise max_pixels (--max-pixels)"
        )
    if width * height == 0:
        raise ImageError(f"{name}: {width} x {height} pixels, expected at least one")

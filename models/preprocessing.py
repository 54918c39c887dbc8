"""How a checkpoint's own processor prepares images, and how the tower cuts them into patches.

Knows preprocessor_config.json of CLIPImageProcessor, LlavaImageProcessor and SiglipImageProcessor, and refuses
steps that they do not have; touches no pixels.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketllava.errors import ConvertError, UnsupportedCheckpoint
from pocketllava.models.siglip import image_processor
from pocketllava.models.tiling import NEXT_PINPOINTS, Tiling

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
MAX_MEAN = 100  # of a mean or a standard deviation of colors from 0 to 1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PatchGrid:
    """image_size and patch_size in pixels, of a square picture."""

    image_size: int
    patch_size: int

    @property
    def grid(self) -> int:
        """Patches along one side: 336 // 14 = 24."""
        return self.image_size // self.patch_size

    @property
    def n_patches(self) -> int:
        """Patches of one picture: 24 * 24 = 576."""
        return self.grid**2


@dataclass(frozen=True)
class Preprocessing:
    """The steps from a picture to pixels: [pad to a square,] resize, center crop, normalize by mean and std.

    shortest_edge: resize so that the shorter side has that many pixels; None resizes to
    (crop_size, crop_size) without keeping the aspect ratio. resample: Pillow's code, 3 is bicubic. tiling: cut the
    picture into tiles of (crop_size, crop_size) instead, as LLaVA-1.6 does.
    """

    shortest_edge: int | None = 336
    crop_size: int = 336
    resample: int = 3
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pad_to_square: bool = False
    tiling: Tiling | None = None

    def most_tokens(self, grid: int) -> int:
        """Positions of one picture in a prompt, at most: every patch of it, or of all tiles and their newlines.

        grid: patches along one side of a (crop_size, crop_size) picture.
        """
        return self.tiling.most_tokens(self.crop_size, grid) if self.tiling else grid**2


def preprocessing(files: Mapping[str, Any], image_size: int, tiling: Tiling | None = None) -> Preprocessing:
    """Read preprocessor_config.json, or processor_config.json's image_processor.

    files: JSON content by file name. Raises UnsupportedCheckpoint for steps that CLIP's and LLaVA's
    image processors don't have.
    """
    p = _settings(files)
    if not p:
        return Preprocessing(shortest_edge=image_size, crop_size=image_size, tiling=tiling)
    kind = str(p.get("image_processor_type", p.get("feature_extractor_type", "CLIPImageProcessor")))
    if not kind.startswith(("CLIP", "Llava", "SiglipImageProcessor")):
        raise UnsupportedCheckpoint(
            f"preprocessor: {kind!r}, expected CLIPImageProcessor, LlavaImageProcessor, LlavaNextImageProcessor or"
            " SiglipImageProcessor"
        )
    if kind.startswith("Siglip"):
        p = image_processor(p, image_size)
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        _expect(p.get(step, True) is not False, step, p.get(step), "true")
    scale = p.get("rescale_factor", 1 / 255)
    _expect(_is_number(scale) and abs(scale * 255 - 1) < 1e-6, "rescale_factor", scale, "1/255")
    crop = _sides(p.get("crop_size", image_size), "crop_size")
    _expect(crop == (image_size, image_size), "crop_size", crop, f"{image_size} x {image_size}")
    size = p.get("size", {"shortest_edge": image_size})
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    _expect(edge is None or _is_whole(edge), "size", size, "pixels, or shortest_edge, or height and width")
    if edge is None:
        sides = _sides(size, "size")
        _expect(sides == crop, "size", sides, f"{crop}")
    else:
        _expect(_is_whole(edge) and 0 < edge < 1 << 16, "shortest_edge", edge, "a positive whole number")
        _expect(tiling is None or edge == image_size, "shortest_edge", edge, f"{image_size}, a tile's")
    resample = p.get("resample", 3)
    _expect(_is_whole(resample) and 0 <= resample <= 5, "resample", resample, "0 to 5")
    return Preprocessing(
        shortest_edge=edge,
        crop_size=image_size,
        resample=int(resample),
        mean=_three(p.get("image_mean", CLIP_MEAN)),
        std=_three(p.get("image_std", CLIP_STD), positive=True),
        # LlavaNextImageProcessor's do_pad is about batches
        pad_to_square=kind.startswith("Llava") and "Next" not in kind and bool(p.get("do_pad")),
        tiling=tiling,
    )


def check_pinpoints(files: Mapping[str, Mapping[str, Any]], tiling: Tiling) -> None:
    """Raise UnsupportedCheckpoint where the image processor's resolutions are not config.json's.

    transformers cuts tiles by the one list and puts them together by the other, and fails.
    """
    if not (p := _settings(files)):
        return
    pinpoints = p.get("image_grid_pinpoints", NEXT_PINPOINTS)  # (height, width)
    expected = [list(size)[::-1] for size in tiling.pinpoints]
    _expect(pinpoints == expected, "image_grid_pinpoints", pinpoints, f"config.json's {expected}")


def _settings(files: Mapping[str, Any]) -> Mapping[str, Any]:
    """The image processor's, from either file. Raises ConvertError for what is no JSON object."""
    own, processor = files.get("preprocessor_config.json"), files.get("processor_config.json")
    inner = processor.get("image_processor") if isinstance(processor, dict) else processor
    name, settings = ("preprocessor_config.json", own) if own else ("processor_config.json", inner)
    if settings is not None and not isinstance(settings, dict):
        raise ConvertError(f"{name}: {reprlib.repr(settings)}, expected a JSON object; download it again")
    return settings or {}


def _sides(size: Any, name: str) -> tuple[int, int]:
    height, width = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if not (isinstance(height, int) and isinstance(width, int)):
        raise UnsupportedCheckpoint(f"preprocessor: {name} {reprlib.repr(size)}, expected height and width")
    return height, width


def _three(values: Any, *, positive: bool = False) -> tuple[float, float, float]:
    try:
        r, g, b = (float(v) for v in values)
    except (TypeError, ValueError, OverflowError):
        r = g = b = math.nan
    if not all(abs(v) <= MAX_MEAN and (v > 0 or not positive) for v in (r, g, b)):
        kind = f"{'positive ' if positive else ''}numbers of at most {MAX_MEAN}"
        raise ConvertError(f"preprocessor: {reprlib.repr(values)}, expected three {kind}")
    return r, g, b


def _expect(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise UnsupportedCheckpoint(f"preprocessor: {name} is {reprlib.repr(value)}, expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    """An integer, Pillow's Resampling among them, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)

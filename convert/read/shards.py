"""A folder -> the tensors of its weight files: safetensors where there are any, otherwise .bin.

Knows the names of weight files and their indexes; the formats are in safetensors.py and torch_zip.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pocketllava.convert.read.safetensors import read_safetensors
from pocketllava.convert.read.sources import SourceTensor, read_json
from pocketllava.convert.read.torch_zip import read_pickled
from pocketllava.errors import ConvertError, TensorMismatch


@dataclass(frozen=True)
class Format:
    """Names of the one file and of the index of several shards, and the function that reads a file."""

    single: str
    index: str
    read: Callable[[Path], list[SourceTensor]]


SAFETENSORS = Format("model.safetensors", "model.safetensors.index.json", read_safetensors)
PICKLED = Format("pytorch_model.bin", "pytorch_model.bin.index.json", read_pickled)
FORMATS = (SAFETENSORS, PICKLED)
INDEXES = tuple(f.index for f in FORMATS)


def has_weights(folder: Path, formats: tuple[Format, ...] = FORMATS) -> bool:
    """Whether the folder has weights or an index in one of the formats."""
    return any((folder / name).is_file() for f in formats for name in (f.index, f.single))


def read_tensors(folder: Path) -> Iterator[SourceTensor]:
    """Every tensor of the folder's weights, shard by shard. Raises ConvertError and its kinds."""
    for layout in FORMATS:
        if (folder / layout.index).is_file():
            yield from _shards(folder, layout)
            return
        if (folder / layout.single).is_file():
            yield from layout.read(folder / layout.single)
            return
    others = sorted(
        p.name for pattern in ("*.bin", "*.safetensors", "*.pt", "*.pth") for p in folder.glob(pattern)
    )
    raise ConvertError(
        f"{folder}: no {SAFETENSORS.single}, no {PICKLED.single} and no index of either"
        + (f" (found {others[0]})" if others else "")
        + "; download the checkpoint's weights"
    )


def _shards(folder: Path, layout: Format) -> Iterator[SourceTensor]:
    weight_map = read_json(folder / layout.index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{folder / layout.index}: no weight_map, expected the shard of every tensor")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ConvertError(
                f"{folder}: shard {name!r} is missing, though {layout.index} names it; download it"
            )
    held = [tensor for name in names for tensor in layout.read(folder / name)]
    if absent := sorted(set(weight_map) - {t.name for t in held}):
        raise TensorMismatch(
            f"{folder}: {layout.index} names {absent[0]!r}, which no shard holds ({len(absent)} such tensors)",
            missing=tuple(absent),
        )
    yield from held

"""A folder -> the tensors of its weight files: safetensors where there are any, otherwise .bin.

Knows the names of weight files and their indexes; the formats are in safetensors.py and torch_zip.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pocketllava.convert.read.safetensors import read_safetensors
from pocketllava.convert.read.sources import SourceTensor, read_json
from pocketllava.convert.read.torch_zip import read_pickled
from pocketllava.errors import ConvertError


@dataclass(frozen=True)
class Format:
    """Names of the one file and of the index of several shards, and the function that reads a file."""

    single: str
    index: str
    read: Callable[[Path], list[SourceTensor]]


SAFETENSORS = Format("model.safetensors", "model.safetensors.index.json", read_safetensors)
PICKLED = Format("pytorch_model.bin", "pytorch_model.bin.index.json", read_pickled)
FORMATS = (SAFETENSORS, PICKLED)


@dataclass(frozen=True)
class Weights:
    """A folder's tensors, each name once, and one line about each oddity of the files."""

    tensors: list[SourceTensor]
    remarks: list[str]


def has_weights(folder: Path, formats: tuple[Format, ...] = FORMATS) -> bool:
    """Whether the folder has weights or an index in one of the formats."""
    return any((folder / name).is_file() for f in formats for name in (f.index, f.single))


def read_tensors(folder: Path) -> Weights:
    """Every tensor of the folder's weights, from the files that transformers would load.

    A whole file comes before shards, whatever an index beside it names. Raises ConvertError and its kinds.
    """
    for layout in FORMATS:
        if (folder / layout.single).is_file():
            beside = (folder / layout.index).is_file()
            remarks = [f"{layout.single}: read; {layout.index} beside it is ignored"] if beside else []
            return Weights(layout.read(folder / layout.single), remarks)
        if (folder / layout.index).is_file():
            return _shards(folder, layout)
    others = sorted(
        p.name for pattern in ("*.bin", "*.safetensors", "*.pt", "*.pth") for p in folder.glob(pattern)
    )
    raise ConvertError(
        f"{folder}: no {SAFETENSORS.single}, no {PICKLED.single} and no index of either"
        + (f" (found {others[0]})" if others else "")
        + "; download the checkpoint's weights"
    )


def _shards(folder: Path, layout: Format) -> Weights:
    weight_map = read_json(folder / layout.index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{folder / layout.index}: no weight_map, expected the shard of every tensor")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ConvertError(
                f"{folder}: shard {name!r} is missing, though {layout.index} names it; download it"
            )
    tensors: dict[str, SourceTensor] = {}
    repeated: list[str] = []
    for tensor in (t for name in names for t in layout.read(folder / name)):
        repeated += [tensor.name] if tensor.name in tensors else []
        tensors[tensor.name] = replace(tensor, indexed=tensor.name in weight_map)  # the last shard counts
    oddities = {
        "named there, in no shard": sorted(set(weight_map) - set(tensors)),
        "in several shards, read from the last": sorted(set(repeated)),
        "not named there": [t.name for t in tensors.values() if not t.indexed],
    }
    remarks = [_remark(layout.index, oddity, found) for oddity, found in oddities.items() if found]
    return Weights(list(tensors.values()), remarks)


def _remark(index: str, oddity: str, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{index}: {oddity}: {names[0]}{more}"

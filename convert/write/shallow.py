"""A vision tower of one block, in memory: so that a load test needs neither the tower's 0.6 GB nor a file.

libmtmd reads all of a tower into memory of its own. A large one is therefore tested in two steps: libmtmd
opens the file itself, reads its keys and looks every tensor up, and is stopped after the first tensor; then it
encodes an image with a copy that holds the first block only. Knows GGUF files and libmtmd's names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from pocketllava.convert.requantize import keys_of
from pocketllava.models.gguf_header import Header

LARGE_BYTES = 256 << 20
BLOCKS = 1
DEPTH, FEATURES = "clip.vision.block_count", "clip.vision.feature_layer"
ALIGNMENT = 32


def shallow(path: Path) -> Path | None:
    """Where a copy with one block lies (gone when the process ends), or None: small file, or no such memory.

    Towers whose features come from several blocks, and platforms without memfd_create, have no such copy.
    """
    header = Header.read(path)
    features = header.keys.get(FEATURES, [0])
    if header.file_bytes < LARGE_BYTES or not hasattr(os, "memfd_create") or len(features) != 1:
        return None
    place = Path(f"/proc/self/fd/{os.memfd_create('mmproj')}")
    _copy(header, place, {DEPTH: BLOCKS, FEATURES: [BLOCKS]})
    return place


def _copy(header: Header, place: Path, changes: dict[str, Any]) -> None:
    kept = [info for info in header.tensors.values() if not _deeper(info.name)]
    writer = GGUFWriter(place, str(header.keys["general.architecture"]))
    for key in keys_of(header):
        writer.add_key_value(key.name, changes.get(key.name, key.value), key.kind, sub_type=key.item)
    for info in kept:
        writer.add_tensor_info(
            info.name,
            info.shape,
            np.dtype(np.float32),
            info.n_bytes,
            raw_dtype=GGMLQuantizationType(info.type),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out: Any = writer.fout[0]
    out.write(b"\0" * (-out.tell() % ALIGNMENT))
    with header.path.open("rb") as file, out:
        for info in kept:
            file.seek(header.data_start + info.offset)
            out.write(file.read(info.n_bytes) + b"\0" * (-info.n_bytes % ALIGNMENT))


def _deeper(name: str) -> bool:
    return name.startswith("v.blk.") and int(name.split(".")[2]) >= BLOCKS

"""A file plan -> one GGUF file, streamed: read, to float32 rows, quantised in threads, written in order.

Each source byte is read once and no tensor is held whole. Knows the container (gguf's GGUFWriter writes
its header); nothing of models. The caller gives a path that no reader looks at yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from pocketllava.convert.ordered import in_order
from pocketllava.convert.plan import FilePlan, PlannedTensor, SourceReader
from pocketllava.convert.quantize import quantize
from pocketllava.errors import ConvertError

ALIGNMENT = 32
Progress = Callable[[str, int, int], None]  # stage ("convert", "verify"), bytes done, bytes in all


def write(
    plan: FilePlan, path: Path, reader: SourceReader, threads: int, advance: Callable[[int], None]
) -> None:
    """Write the file and flush it to the disk. `advance` is told the source bytes of every piece written."""
    writer = _header(plan, path)
    file: Any = writer.fout[0]
    try:
        for tensor, last, data, source_bytes in in_order(_jobs(plan, reader), threads):
            file.write(data)
            if last:
                file.write(b"\0" * (-tensor.n_bytes % ALIGNMENT))
            advance(source_bytes)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        file.close()


def _header(plan: FilePlan, path: Path) -> GGUFWriter:
    writer = GGUFWriter(path, plan.architecture)
    for key in plan.keys:
        writer.add_key_value(key.name, key.value, key.kind, sub_type=key.item)
    for tensor in plan.tensors:
        dtype = np.dtype(np.float32)  # ignored: raw_dtype names the type
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.n_bytes, raw_dtype=tensor.type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file: Any = writer.fout[0]
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written ({error.strerror or error})") from error
    return writer


Piece = tuple[PlannedTensor, bool, bytes, int]


def _jobs(plan: FilePlan, reader: SourceReader) -> Iterator[Callable[[], Piece]]:
    """One job a piece: (tensor, is its last piece, quantised bytes, source bytes). Reading is done here."""
    for tensor in plan.tensors:
        for first, count in tensor.chunks():
            yield partial(
                _quantized, tensor, first + count == tensor.n_rows, reader.rows(tensor, first, count)
            )


def _quantized(tensor: PlannedTensor, last: bool, raw: bytes) -> Piece:
    return (
        tensor,
        last,
        quantize(tensor.to_float(raw), tensor.type, tensor.source.name, tensor.importance),
        len(raw),
    )

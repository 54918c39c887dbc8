"""File plans -> GGUF files, streamed together: rows read, quantized and compared in threads, written in order.

Each source byte is read once, whatever the number of files, and no tensor is held whole. Every piece of a
tensor is compared with the rows it came from as soon as it is quantized (verify.py), and every byte, a little
after it was written, with what the disk holds (pages.py). Knows the container (gguf's
GGUFWriter writes its header); nothing of models. The caller gives paths that no reader looks at yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from pocketllava.convert.plan.file_plan import FilePlan, PlannedTensor, SourceReader
from pocketllava.convert.plan.quantize import Floats, checked_copy, quantize
from pocketllava.convert.write.journal import Journal, Whole
from pocketllava.convert.write.ordered import in_order
from pocketllava.convert.write.pages import Checked
from pocketllava.convert.write.verify import Sums, check_error, difference
from pocketllava.errors import ConvertError

ALIGNMENT = 32
Progress = Callable[[str, int, int, str], None]  # "convert" or "verify", bytes done, in all, current tensor
Advance = Callable[[int, str], None]  # bytes, of which tensor
Made = tuple[bytes, Sums]
# The tensor in each file, whether this is its last piece, what was made of it by type, source bytes.
Piece = tuple[tuple[PlannedTensor, ...], bool, dict[GGMLQuantizationType, Made], int]


def write(
    plan: FilePlan, path: Path, reader: SourceReader, threads: int, advance: Callable[[int], None]
) -> str:
    """Write one file and flush it to the disk; returns its SHA-256. `advance` is told source bytes."""
    with Output(plan, path) as output:
        write_together([output], reader, threads, lambda n, _name: advance(n))
        return output.finish()


class Output:
    """One GGUF file being written: what is whole in it, its hash so far, the error of its current tensor."""

    def __init__(
        self, plan: FilePlan, path: Path, journal: Journal | None = None, whole: Whole | None = None
    ) -> None:
        self.plan, self.path, self.journal = plan, path, journal
        self._sums: Sums = (0.0, 0.0)
        self.n_whole = whole.n_tensors if whole else 0
        self.digest: Any = whole.digest if whole else hashlib.sha256()
        with _named(path):
            header = b"" if whole else _header(plan, path)
            self._file = Checked(path, at=whole.end if whole else 0)
            self._write(header)
        if whole is None:
            self._record()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, tensor: PlannedTensor, last: bool, made: Made) -> None:
        """Write the next piece. Raises ConvertError when a whole tensor lost too much in its type."""
        data, sums = made
        with _named(self.path):
            self._write(data + b"\0" * (-tensor.n_bytes % ALIGNMENT) if last else data)
        self._sums = (self._sums[0] + sums[0], self._sums[1] + sums[1])
        if last:
            check_error(tensor, self._sums)
            self._sums = (0.0, 0.0)
            self._end_tensor()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)

    def _end_tensor(self) -> None:
        self.n_whole += 1
        self._record()

    def _record(self) -> None:
        """In the journal: what is whole."""
        if self.journal:
            with _named(self.path):
                self._file.flush()
            self.journal.add(self.path.name, Whole(self.n_whole, self._file.end, self.digest))

    def finish(self) -> str:
        """Have it all on the disk; the SHA-256 of all that was written, in hexadecimal.

        Raises ConvertError when the disk holds something else.
        """
        with _named(self.path):
            self._file.finish()
        return str(self.digest.hexdigest())


def write_together(outputs: Sequence[Output], reader: SourceReader, threads: int, advance: Advance) -> None:
    """Write the tensors that no output lacks alone: all start after the same tensor, from the same sources."""
    first = outputs[0].n_whole
    skipped = outputs[0].plan.tensors[:first]
    if skipped:
        advance(sum(t.source.n_bytes for t in skipped), skipped[-1].name)
    groups = list(zip(*(o.plan.tensors[first:] for o in outputs), strict=True))
    for tensors, last, made, source_bytes in in_order(_jobs(groups, reader), threads):
        for output, tensor in zip(outputs, tensors, strict=True):
            output.add(tensor, last, made[tensor.type])
        advance(source_bytes, tensors[0].name)


def _header(plan: FilePlan, path: Path) -> bytes:
    """What the file begins with; gguf's writer needs a file to write it to."""
    writer = GGUFWriter(path, plan.architecture)
    for key in plan.keys:
        writer.add_key_value(key.name, key.value, key.kind, sub_type=key.item)
    for tensor in plan.tensors:
        dtype = np.dtype(np.float32)  # ignored: raw_dtype names the type
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.n_bytes, raw_dtype=tensor.type)
    writer.write_header_to_file()
    file: Any = writer.fout[0]
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
    finally:
        file.close()
    return path.read_bytes()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an OSError into a ConvertError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written ({error.strerror or error})") from error


def _jobs(groups: list[tuple[PlannedTensor, ...]], reader: SourceReader) -> Iterator[Callable[[], Piece]]:
    """One job a piece; each reads its own rows, so that reading overlaps with the rest."""
    for tensors in groups:
        for first, count in tensors[0].chunks():
            yield partial(_piece, tensors, reader, first, count)


def _piece(tensors: tuple[PlannedTensor, ...], reader: SourceReader, first: int, count: int) -> Piece:
    raw = reader.rows(tensors[0], first, count)
    rows = None if all(t.copied for t in tensors) else tensors[0].to_float(raw)
    made = {t.type: _made(t, raw, rows) for t in {t.type: t for t in tensors}.values()}
    return tensors, first + count == tensors[0].n_rows, made, len(raw)


def _made(tensor: PlannedTensor, raw: bytes, rows: Floats | None) -> Made:
    """A piece in its type, and how far it is from its source: bytes that are copied are no way off."""
    if tensor.copied or rows is None:
        return checked_copy(raw, tensor.type, tensor.source.name), (0.0, 0.0)
    data = quantize(rows, tensor.type, tensor.source.name, tensor.importance)
    return data, difference(data, tensor.type, rows)

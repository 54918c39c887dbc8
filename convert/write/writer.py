"""File plans -> GGUF files, streamed together: rows read, quantized and compared in threads, written in order.

Each source byte is read once, whatever the number of files, and at most a few chunks of a tensor are in memory.
Every chunk is compared with its source rows as soon as it is quantized (verify.py), and everything written is hashed
and flushed to the disk. Knows the order of a file's parts; nothing of models. Paths are the staging folder's.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gguf import GGMLQuantizationType

from pocketllava.convert.plan.file_plan import FilePlan, PlannedTensor
from pocketllava.convert.plan.quantize import Floats, checked_copy, quantize
from pocketllava.convert.read.source_reader import SourceReader
from pocketllava.convert.write.durable import DurableFile
from pocketllava.convert.write.journal import Completed, Journal
from pocketllava.convert.write.verify import SquaredSums, check_error, difference
from pocketllava.errors import ConvertError
from pocketllava.models.gguf_writer import header_bytes, padding

Progress = Callable[[str, int, int, str], None]  # "convert" or "verify", bytes done, in all, current tensor
Advance = Callable[[int, str], None]  # bytes, of which tensor
Quantized = tuple[bytes, SquaredSums]
# The tensor in each file, whether this is its last chunk, the chunk in each type, source bytes.
Chunk = tuple[tuple[PlannedTensor, ...], bool, dict[GGMLQuantizationType, Quantized], int]
Result = TypeVar("Result")


def write(
    plan: FilePlan, path: Path, reader: SourceReader, threads: int, advance: Callable[[int], None]
) -> str:
    """Write one file and flush it to the disk; returns its SHA-256. `advance` is called with source bytes."""
    with Output(plan, path) as output:
        write_together([output], reader, threads, lambda n, _name: advance(n))
        return output.finish()


class Output:
    """One GGUF file being written: its complete tensors, its hash so far, the error of its current tensor."""

    def __init__(
        self, plan: FilePlan, path: Path, journal: Journal | None = None, completed: Completed | None = None
    ) -> None:
        """Begin the file, or continue it after its completed tensors."""
        self.plan, self.path, self.journal = plan, path, journal
        self._sums: SquaredSums = (0.0, 0.0)
        self.n_completed = completed.n_tensors if completed else 0
        self.digest: Any = completed.digest if completed else hashlib.sha256()
        with _named(path):
            self._file = DurableFile(path, completed.end if completed else 0)
            if completed is None:
                self._write(header_bytes(plan.architecture, plan.keys, plan.tensors))
        if completed is None:
            self._record()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, tensor: PlannedTensor, last: bool, chunk: Quantized) -> None:
        """Write the next chunk. Raises ConvertError when a complete tensor lost too much in its type."""
        data, sums = chunk
        with _named(self.path):
            self._write(data + padding(tensor.n_bytes) if last else data)
        self._sums = (self._sums[0] + sums[0], self._sums[1] + sums[1])
        if last:
            check_error(tensor, self._sums)
            self._sums = (0.0, 0.0)
            self.n_completed += 1
            self._record()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)

    def _record(self) -> None:
        """Note in the journal how far the file is complete."""
        if self.journal:
            with _named(self.path):
                self._file.flush()
            self.journal.add(self.path.name, Completed(self.n_completed, self._file.end, self.digest))

    def finish(self) -> str:
        """Have everything on the disk; returns the SHA-256 of what was written, in hexadecimal."""
        with _named(self.path):
            self._file.finish()
        return str(self.digest.hexdigest())


def write_together(outputs: Sequence[Output], reader: SourceReader, threads: int, advance: Advance) -> None:
    """Write the remaining tensors of several files that continue after the same tensor, from the same sources."""
    first = outputs[0].n_completed
    completed = outputs[0].plan.tensors[:first]
    if completed:
        advance(sum(t.source.n_bytes for t in completed), completed[-1].name)
    groups = list(zip(*(o.plan.tensors[first:] for o in outputs), strict=True))
    for tensors, last, chunks, source_bytes in _in_order(_jobs(groups, reader), threads):
        for output, tensor in zip(outputs, tensors, strict=True):
            output.add(tensor, last, chunks[tensor.type])
        advance(source_bytes, tensors[0].name)


def _in_order(jobs: Iterable[Callable[[], Result]], threads: int) -> Iterator[Result]:
    """Run jobs in threads and yield their results in order; at most 2 * threads are drawn ahead and in memory."""
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn an OSError into a ConvertError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written ({error.strerror or error})") from error


def _jobs(groups: list[tuple[PlannedTensor, ...]], reader: SourceReader) -> Iterator[Callable[[], Chunk]]:
    """One job for each chunk; each reads its own rows, so that reading overlaps with quantizing."""
    for tensors in groups:
        for first, count in tensors[0].chunks():
            yield partial(_chunk, tensors, reader, first, count)


def _chunk(tensors: tuple[PlannedTensor, ...], reader: SourceReader, first: int, count: int) -> Chunk:
    tensor = tensors[0]
    row_bytes = tensor.source_row_bytes
    raw = reader.read(tensor.source, first * row_bytes, count * row_bytes)
    rows = None if all(t.copied for t in tensors) else tensor.to_float(raw)
    by_type = {t.type: t for t in tensors}
    chunks = {kind: _quantized(t, raw, rows) for kind, t in by_type.items()}
    return tensors, first + count == tensor.n_rows, chunks, len(raw)


def _quantized(tensor: PlannedTensor, raw: bytes, rows: Floats | None) -> Quantized:
    """A chunk's bytes in the tensor's type, and their difference from (n_rows, n_per_row) source rows."""
    if tensor.copied or rows is None:
        return checked_copy(raw, tensor.type, tensor.source.name), (0.0, 0.0)
    data = quantize(rows, tensor.type, tensor.source.name, tensor.importance)
    return data, difference(data, tensor.type, rows)

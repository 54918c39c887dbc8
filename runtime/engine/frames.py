"""Frames over a pipe: a JSON object and, behind it, raw bytes. Knows bytes; nothing of models.

A frame is the length of its JSON (4 bytes, big-endian), the JSON, and the blobs whose lengths its "blobs" lists.
Either side is this program, so a frame that breaks the limits is a fault, not something to repair.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_JSON_BYTES = 256 << 20  # a conversation's texts, or log probabilities of a long answer
MAX_BLOB_BYTES = 4 << 30  # a picture of 50 megapixels as float64 values takes 1.2 GB
Blobs = Sequence["bytes | memoryview"]


@dataclass(frozen=True)
class Frame:
    """What was sent at once."""

    fields: dict[str, Any]
    blobs: tuple[bytes, ...] = ()


class FrameWriter:
    """Writes whole frames; threads may share it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock = file, threading.Lock()

    def write(self, fields: dict[str, Any], blobs: Blobs = ()) -> None:
        """Raises OSError (BrokenPipeError) when the other side is gone."""
        header = json.dumps({**fields, "blobs": [len(blob) for blob in blobs]}).encode()
        with self._lock:
            self._file.write(struct.pack(">I", len(header)) + header)
            for blob in blobs:
                self._file.write(blob)
            self._file.flush()

    def close(self) -> None:
        """Tell the other side that nothing follows."""
        with self._lock:
            self._file.close()


def read_frame(file: BinaryIO) -> Frame | None:
    """The next frame; None at the end, and for what is no frame."""
    try:
        size = file.read(4)
        if len(size) < 4 or (n := struct.unpack(">I", size)[0]) > MAX_JSON_BYTES:
            return None
        header = file.read(n)
        if len(header) < n:
            return None
        fields = json.loads(header)
        lengths = fields.pop("blobs")
        if any(not 0 <= length <= MAX_BLOB_BYTES for length in lengths):
            return None
        blobs = tuple(file.read(length) for length in lengths)
    except (OSError, ValueError, KeyError, TypeError, MemoryError):
        return None
    return Frame(fields, blobs) if [len(blob) for blob in blobs] == lengths else None

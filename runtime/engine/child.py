"""The child process of a ProcessEngine: holds the model, and answers frames on stdin with frames on stdout.

Knows frames and a LocalEngine. File descriptors 0 and 1 are taken away before llama.cpp is loaded, so that nothing it
prints can reach a frame. Once stdin ends the parent is gone, and the process ends, whatever it is doing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pocketllava.engine import wire
from pocketllava.engine.frames import Frame, FrameWriter, read_frame
from pocketllava.engine.local import Call, LocalEngine
from pocketllava.llamacpp.children import speak_utf8
from pocketllava.llamacpp.guard import Interrupted
from pocketllava.types import LoadOptions, Progress

# Chunks of fast models leave together: each frame wakes the parent, which takes a core from the threads that decode.
# 25 frames a second are as many as a film's.
GATHER_S = 0.04


class _LogFrames(logging.Handler):
    """Sends log records to the parent."""

    def __init__(self, writer: FrameWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        """Lost if the parent is gone."""
        with contextlib.suppress(Exception):
            self._writer.write({"type": "log", "entry": [record.name, record.levelno, record.getMessage()]})


class Child:
    """Serves one parent."""

    def __init__(self, reader: BinaryIO, writer: FrameWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._cancelled = 0  # every call up to this one: calls come one at a time, in order
        self._engine: LocalEngine | None = None
        threading.Thread(target=self._read, name="pocketllava frames", daemon=True).start()

    def _read(self) -> None:
        while (frame := read_frame(self._reader)) is not None:
            if frame.fields["do"] == "cancel":
                self._cancelled = frame.fields["id"]
            else:
                self._frames.put(frame)
        os._exit(0)

    def serve(self) -> None:
        """Until the process ends."""
        while True:
            frame = self._frames.get()
            number = frame.fields["id"]
            self._write(number, "begun", None)  # whatever ends the process from here on may be this call
            try:
                if frame.fields["cwd"] is not None:  # relative paths are the parent's
                    with contextlib.suppress(OSError):
                        os.chdir(frame.fields["cwd"])
                result, blobs = getattr(self, f"_do_{frame.fields['do']}")(frame)
            except Exception as error:
                self._write(number, "error", wire.pack_error(error))
            except Interrupted:
                self._write(number, "interrupted", None)
            else:
                self._write(number, "done", result, blobs)

    def _write(self, number: int, kind: str, value: Any, blobs: tuple[bytes, ...] = ()) -> None:
        self._writer.write({"type": kind, "id": number, "value": value}, blobs)

    def _loaded(self) -> LocalEngine:
        assert self._engine is not None  # the parent loads first
        return self._engine

    def _call(self, frame: Frame) -> Call:
        number = frame.fields["id"]
        report: Callable[[Progress], None] | None = None
        if frame.fields["progress"]:

            def report(progress: Progress) -> None:
                self._write(number, "progress", [progress.stage, progress.done, progress.total])

        options = wire.unpack_options(frame.fields["options"])
        return Call(options, lambda: number <= self._cancelled, report)

    def _do_load(self, frame: Frame) -> tuple[Any, tuple[bytes, ...]]:
        from pocketllava.engine.loading import load_bundle
        from pocketllava.models import Bundle

        bundle, options = Bundle.open(Path(frame.fields["bundle"])), LoadOptions(**frame.fields["options"])
        self._engine = LocalEngine(lambda: load_bundle(bundle, options))
        return [*self._engine.devices, self._engine.n_ctx], ()

    def _do_answer(self, frame: Frame) -> tuple[Any, tuple[bytes, ...]]:
        messages = wire.unpack_messages(frame.fields["messages"], frame.blobs)
        held: list[dict[str, Any]] = []
        sent_s = -math.inf
        with contextlib.closing(self._loaded().answer(messages, self._call(frame))) as chunks:
            try:
                for chunk in chunks:
                    held.append(wire.pack_chunk(chunk))
                    if (now_s := time.monotonic()) - sent_s >= GATHER_S:
                        self._write(frame.fields["id"], "chunks", held)
                        held, sent_s = [], now_s
            finally:
                if held:
                    self._write(frame.fields["id"], "chunks", held)
        return None, ()

    def _do_prefill(self, frame: Frame) -> tuple[Any, tuple[bytes, ...]]:
        messages = wire.unpack_messages(frame.fields["messages"], frame.blobs)
        self._loaded().prefill(messages, self._call(frame))
        return None, ()

    def _do_image_features(self, frame: Frame) -> tuple[Any, tuple[bytes, ...]]:
        image = wire.unpack_image(frame.fields["image"], iter(frame.blobs))
        features = self._loaded().image_features(image, frame.fields["image_tokens"])
        return list(features.shape), (features.astype("<f4").tobytes(),)

    def _do_view(self, frame: Frame) -> tuple[Any, tuple[bytes, ...]]:
        image = wire.unpack_image(frame.fields["image"], iter(frame.blobs))
        png = io.BytesIO()
        self._loaded().view(image, frame.fields["image_tokens"]).save(png, "PNG")
        return None, (png.getvalue(),)

    def _do_count_tokens(self, frame: Frame) -> tuple[Any, tuple[bytes, ...]]:
        messages = wire.unpack_messages(frame.fields["messages"], frame.blobs)
        return self._loaded().count_tokens(messages, frame.fields["image_tokens"]), ()

    def _do_trace(self, frame: Frame) -> tuple[Any, tuple[bytes, ...]]:
        messages = wire.unpack_messages(frame.fields["messages"], frame.blobs)
        return dataclasses.asdict(self._loaded().trace(messages, frame.fields["image_tokens"])), ()

    def _do_clear(self, _frame: Frame) -> tuple[Any, tuple[bytes, ...]]:
        self._loaded().clear()
        return None, ()


def main() -> None:
    """The process."""
    speak_utf8()
    reader, writer = os.fdopen(os.dup(0), "rb"), FrameWriter(os.fdopen(os.dup(1), "wb"))
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    log = logging.getLogger("pocketllava")
    log.setLevel(int(sys.argv[-1]))
    log.addHandler(_LogFrames(writer))
    Child(reader, writer).serve()


if __name__ == "__main__":
    main()

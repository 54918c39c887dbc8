"""ProcessEngine: an Engine in a child process, which llama.cpp may end without ending this one.

Knows the child's life and its frames; this process never loads llama.cpp. A call that the child does not survive
raises EngineDied, and the next one starts another child. The child goes when this process goes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import queue
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketllava.engine import wire
from pocketllava.engine.frames import Frame, FrameWriter, read_frame
from pocketllava.engine.local import Call
from pocketllava.errors import BackendError, EngineDied
from pocketllava.llamacpp.children import (
    ChildResult,
    isolated_command,
    isolated_environment,
    keep_end,
    last_line,
    of_its_own,
)
from pocketllava.llamacpp.guard import Interrupted, ShouldStop
from pocketllava.models import Bundle
from pocketllava.types import PAIR, Chunk, ImageSource, LoadOptions, Message, Options, Progress, Trace
from pocketllava.vision.decoding import MAX_PIXELS
from pocketllava.vision.image_processor import ImageProcessor

if TYPE_CHECKING:
    from PIL import Image

    from pocketllava.vision.feature_cache import Features

MODULE = "pocketllava.engine.child"
POLL_S = 0.01  # how often should_stop is asked while the child works
# For a cancelled call to end, before the child is killed. Beside other programs on one core Linux let a child wait for
# 5 s where it needed 0.02.
GRACE_S = 20.0
ENDINGS = ("done", "error", "interrupted")  # types of the frame that ends a call


class _Process:
    """One child, from its start to its end."""

    def __init__(self, worker_command: Sequence[str] | None) -> None:
        """Raises BackendError where no child can be started."""
        level = str(logging.getLogger("pocketllava").getEffectiveLevel())
        command = [*isolated_command(MODULE, worker_command), level]
        pipe = subprocess.PIPE
        try:
            self._child = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                cwd=tempfile.gettempdir(),
                env=isolated_environment(),
                **of_its_own(),
            )
        except OSError as error:
            raise BackendError(
                f"{command[0]}: cannot be run ({error.strerror or error}); pass worker_command=[...], a command that"
                " starts pocketllava's worker"
            ) from error
        assert self._child.stdin
        self._writer = FrameWriter(self._child.stdin)  # type: ignore[arg-type]
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._errors = bytearray()
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._child.poll() is None

    def send(self, fields: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """A frame. Raises EngineDied."""
        try:
            self._writer.write(fields, blobs)
        except (OSError, ValueError) as error:  # ValueError: closed
            raise self.died() from error

    def next(self, timeout_s: float | None) -> Frame | None:
        """The next frame, None if there is none in time. Raises EngineDied."""
        try:
            frame = self._frames.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if frame is None:
            raise self.died()
        return frame

    def died(self, reason: str = "") -> EngineDied:
        """The error for what happened to it, or why it is ended; it is gone after this."""
        self.end()
        said = last_line(bytes(self._errors).decode("utf-8", "replace"))
        reason = reason or ChildResult(None, self._child.returncode, said).reason
        return EngineDied(f"engine: its process ended ({reason}); ask again, the model is loaded anew")

    def end(self) -> None:
        """Kill it and let go of its pipes."""
        self._child.kill()
        self._child.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it did not read
                    pipe.close()

    def _read(self) -> None:
        assert self._child.stdout
        while (frame := read_frame(self._child.stdout)) is not None:  # type: ignore[arg-type]
            if frame.fields["type"] == "log":
                name, level, text = frame.fields["entry"]
                logging.getLogger(str(name)).log(int(level), "%s", text)
            else:
                self._frames.put(frame)
        self._frames.put(None)

    def _read_errors(self) -> None:
        assert self._child.stderr
        with contextlib.suppress(OSError, ValueError):
            keep_end(self._child.stderr, self._errors)


class _Watch:
    """One call's frames, and the wish to end it. Grace is what was waited here: a caller's pauses are its own."""

    def __init__(self, process: _Process, number: int, should_stop: ShouldStop | None) -> None:
        self._process, self._number, self._should_stop = process, number, should_stop
        self._told, self._waited_s = False, 0.0

    def next(self) -> Frame:
        """The next frame. Raises EngineDied."""
        while True:
            self._tell()
            start_s = time.monotonic()
            frame = self._process.next(POLL_S if self._should_stop else None)
            if self._told:
                self._waited_s += time.monotonic() - start_s
            if frame is not None and frame.fields["type"] in ENDINGS:
                return frame
            if self._waited_s > GRACE_S:
                raise self._process.died(f"it went on for {GRACE_S:g} s after its call was cancelled")
            if frame is not None:
                return frame

    def _tell(self) -> None:
        """Tell the child once should_stop() is true. Raises EngineDied."""
        if not self._told and self._should_stop is not None and self._should_stop():
            self._process.send({"do": "cancel", "id": self._number})
            self._told = True


class ProcessEngine:
    """An Engine in a child process."""

    def __init__(
        self, bundle: Bundle, options: LoadOptions, worker_command: Sequence[str] | None = None
    ) -> None:
        """Starts a child and loads the bundle there. Raises what loading raises."""
        self._bundle, self._command = bundle, worker_command
        fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name not in PAIR}
        if options.cache_dir is not None:
            fields["cache_dir"] = str(Path(options.cache_dir).absolute())
        self._options = json.loads(json.dumps(fields))
        self._images = ImageProcessor(
            bundle.preprocessing,
            grid=bundle.mmproj_info.grid,
            max_pixels=options.max_pixels or MAX_PIXELS,
            encoder="",
        )
        self._process: _Process | None = None
        self._finalizer = weakref.finalize(self, int)  # the child's end, once there is one
        self._n_calls = 0
        self._devices, self._n_ctx = ("", ""), 0
        self._start()

    @property
    def devices(self) -> tuple[str, str]:
        return self._devices

    @property
    def n_ctx(self) -> int:
        return self._n_ctx

    @property
    def loaded(self) -> bool:
        process = self._process
        return process is not None and process.alive

    def answer(self, messages: Sequence[Message], call: Call) -> Generator[Chunk, None, None]:
        packed, blobs = wire.pack_messages(messages)
        with contextlib.closing(self._stream("answer", call, blobs, messages=packed)) as frames:
            for frame in frames:
                if frame.fields["type"] == "chunks":
                    yield from map(wire.unpack_chunk, frame.fields["value"])

    def prefill(self, messages: Sequence[Message], call: Call) -> None:
        packed, blobs = wire.pack_messages(messages)
        for _ in self._stream("prefill", call, blobs, messages=packed):
            pass

    def image_features(self, image: ImageSource, image_tokens: int | None) -> Features:
        done = self._ask_about(image, "image_features", image_tokens)
        return np.frombuffer(done.blobs[0], "<f4").reshape(done.fields["value"]).copy()

    def view(self, image: ImageSource, image_tokens: int | None) -> Image.Image:
        from PIL import Image

        return Image.open(io.BytesIO(self._ask_about(image, "view", image_tokens).blobs[0])).convert("RGB")

    def count_tokens(self, messages: Sequence[Message], image_tokens: int | None) -> int:
        packed, blobs = wire.pack_messages(messages)
        done = self._ask("count_tokens", blobs, messages=packed, image_tokens=image_tokens)
        return int(done.fields["value"])

    def trace(self, messages: Sequence[Message], image_tokens: int | None) -> Trace:
        packed, blobs = wire.pack_messages(messages)
        done = self._ask("trace", blobs, messages=packed, image_tokens=image_tokens)
        return wire.unpack_trace(done.fields["value"])

    def clear(self) -> None:
        if self.loaded:
            self._ask("clear", ())

    def digest(self, image: ImageSource) -> str | None:
        return self._images.digest(image)

    def fingerprint(self, image: ImageSource) -> str:
        return self._images.process(image).key

    def unload(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()

    close = unload

    def _start(self) -> _Process:
        """A child that has loaded the bundle."""
        self._process = _Process(self._command)
        self._finalizer.detach()
        self._finalizer = weakref.finalize(self, self._process.end)
        try:
            done = self._run(
                self._process, "load", bundle=str(self._bundle.folder.absolute()), options=self._options
            )
        except BaseException:
            self.unload()
            raise
        text, vision, self._n_ctx = done.fields["value"]
        self._devices = (text, vision)
        return self._process

    def _running(self) -> _Process:
        process = self._process
        if process is not None and process.alive:
            return process
        self.unload()  # the pipes of one that ended between two calls
        return self._start()

    def _ask_about(self, image: ImageSource, do: str, image_tokens: int | None) -> Frame:
        blobs: list[bytes] = []
        packed = wire.pack_image(image, blobs)
        return self._ask(do, blobs, image=packed, image_tokens=image_tokens)

    def _ask(self, do: str, blobs: Sequence[bytes], **fields: Any) -> Frame:
        return self._run(self._running(), do, blobs, **fields)

    def _run(self, process: _Process, do: str, blobs: Sequence[bytes] = (), **fields: Any) -> Frame:
        """The frame that ends a call. Raises what the child raised, EngineDied."""
        return list(self._frames(process, do, Call(Options()), blobs, **fields))[-1]

    def _stream(
        self, do: str, call: Call, blobs: Sequence[bytes], **fields: Any
    ) -> Generator[Frame, None, None]:
        options = wire.pack_options(call.options)
        wants = call.on_progress is not None
        return self._frames(self._running(), do, call, blobs, options=options, progress=wants, **fields)

    def _frames(
        self,
        process: _Process,
        do: str,
        call: Call,
        blobs: Sequence[bytes],
        again: bool = False,
        **fields: Any,
    ) -> Generator[Frame, None, None]:
        """A call's frames, the one that ends it last. Closed early, it cancels the call and waits for its end.

        A child that was ending already, and never began with the call, is replaced: the call cannot be to blame.
        """
        self._n_calls += 1
        number, ended, begun = self._n_calls, False, False
        watch = _Watch(process, number, call.should_stop)
        try:
            process.send({"do": do, "id": number, "cwd": _current_folder(), **fields}, blobs)
            while not ended:
                frame = watch.next()
                kind: str = frame.fields["type"]
                begun = True  # the first frame says no more
                value: Any = frame.fields.get("value")
                if kind == "progress" and call.on_progress is not None:
                    call.on_progress(Progress(*value))
                ended = kind in ENDINGS
                if kind == "error":
                    raise wire.unpack_error(value)
                if kind == "interrupted":
                    raise Interrupted
                if kind not in ("begun", "progress"):
                    yield frame
        except EngineDied:
            ended = True
            if begun or again or do == "load":
                raise
        finally:
            if not ended:
                self._cancel(process, number)
        if not begun:
            yield from self._frames(self._running(), do, call, blobs, again=True, **fields)

    def _cancel(self, process: _Process, number: int) -> None:
        """End a call that nobody waits for; its frames go nowhere."""
        end = time.monotonic() + GRACE_S
        with contextlib.suppress(EngineDied):
            process.send({"do": "cancel", "id": number})
            while (left_s := end - time.monotonic()) > 0:
                frame = process.next(left_s)
                if frame and frame.fields["id"] == number and frame.fields["type"] in ENDINGS:
                    return
        process.end()


def _current_folder() -> str | None:
    """For relative paths; None where it was deleted."""
    try:
        return str(Path.cwd())
    except OSError:
        return None

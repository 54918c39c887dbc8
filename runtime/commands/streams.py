"""The standard streams: there whatever the shell closed, UTF-8 whatever the locale says.

Knows file descriptors; nothing of commands. stdout carries results, so a result that it does not take is an error.
stderr carries messages; one that it does not take is lost, and the work goes on.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any

OPENED_FOR = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)  # writing to a stdout that was closed must fail


class OutputError(Exception):
    """stdout did not take a result. Its text is one line."""


class _Results(io.FileIO):
    """stdout. A broken pipe stays one: click ends quietly then."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"stdout: cannot be written ({error.strerror or error})") from error


class _Messages(io.FileIO):
    """stderr."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(data)


def open_streams() -> None:
    """Open what is closed, and have all three speak UTF-8: answers are in any script.

    A descriptor that stays closed would be given to the next file that is opened, and llama.cpp's messages would be
    written into it.
    """
    for number, flags in enumerate(OPENED_FOR):
        _occupy(number, flags)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = _text(sys.stdout, _Results, 1)
    sys.stderr = _text(sys.stderr, _Messages, 2)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(encoding="utf-8", errors="replace")


def flush_results() -> None:
    """Have all results on their way. Raises OutputError, and then forgets them: the interpreter would try again."""
    try:
        sys.stdout.flush()
    except (OutputError, OSError):
        with contextlib.suppress(OSError, OutputError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
            sys.stdout.flush()
        raise


def _occupy(number: int, flags: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, flags)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def _text(stream: Any, raw: type[io.FileIO], number: int) -> Any:
    """A text stream over a descriptor; a Windows console's own one is kept, which writes UTF-16."""
    if stream is not None and (sys.platform == "win32" and stream.isatty()):
        return stream
    buffered = io.BufferedWriter(raw(number, "wb", closefd=False))
    return io.TextIOWrapper(buffered, "utf-8", "replace", line_buffering=number == 2 or os.isatty(number))

"""Python child processes for work that llama.cpp may end the process over, such as loading an untested file.

Knows interpreters, pipes and signals; nothing of models. A child imports from the interpreter's own folders and
from the parent's absolute ones, never from the current folder: a checkpoint's folder may hold a numpy.py. It runs
in an empty folder, without PYTHON* variables, and counts as having answered only if it repeats a token that it
was given on stdin.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pocketllava.errors import BackendError, PocketLlavaError

TIMEOUT_S = 600.0
MAX_OUTPUT_BYTES = 1 << 16  # of each stream, from its end
MAX_LINE = 1000  # characters
SOURCE_FILE = re.compile(r"\S*[/\\](?=[\w.-]+\.(?:c|cc|cpp|cu|h|hpp|m|mm):\d)")


@dataclass(frozen=True)
class ChildResult:
    """How a child ended. answer: what its function gave last, None for nothing; last_line: of stderr.

    exit_code: None after a timeout, negative for a signal.
    """

    answer: Any
    exit_code: int | None
    last_line: str

    @property
    def ending(self) -> str:
        """Such as "exit code 1", "signal SIGSEGV" or "no answer in time"."""
        if self.exit_code is None:
            return "no answer in time"
        if self.exit_code < 0:
            with contextlib.suppress(ValueError):
                return f"signal {signal.Signals(-self.exit_code).name}"
            return f"signal {-self.exit_code}"
        return f"exit code {self.exit_code if self.exit_code < 256 else hex(self.exit_code)}"  # hex: Windows

    @property
    def reason(self) -> str:
        """The ending and the last line of stderr, for an error."""
        return f"{self.ending}: {self.last_line or 'without a message'}"


def run_child(
    function: str,
    *arguments: str | Path,
    timeout_s: float = TIMEOUT_S,
    worker_command: Sequence[str] | None = None,
) -> ChildResult:
    """Call `function` ("package.module:name") in a child; its arguments are text, paths made absolute.

    The function returns a JSON value, or yields several: the last one before the child's end counts.
    worker_command: what starts a worker where sys.executable is no Python
    interpreter (a frozen application), such as [python, "-I", "-m", "pocketllava.llamacpp.children"].
    Raises BackendError if no child could be started, or something else than a worker was.
    """
    command = isolated_command(__name__, worker_command)
    token = secrets.token_hex(16)
    task = {
        "function": function,
        "arguments": [str(a.absolute()) if isinstance(a, Path) else a for a in arguments],
        "token": token,
    }
    with tempfile.TemporaryDirectory(prefix="pocketllava-") as folder:
        try:
            exit_code, stdout, stderr = _run(command, json.dumps(task).encode(), folder, timeout_s)
        except OSError as error:
            raise BackendError(
                f"{_named(command)}: cannot be run ({error.strerror or error}); {_ADVICE}"
            ) from error
    answers = [line.removeprefix(token) for line in stdout.splitlines() if line.startswith(token)]
    if exit_code == 0 and not answers:
        raise BackendError(
            f"{_named(command)}: ended without an answer, expected a Python interpreter; {_ADVICE}"
        )
    answer = json.loads(answers[-1]) if answers else None
    return ChildResult(answer, exit_code, last_line(stderr))


# sys.path comes before any import of this package: the child's own folders first, then the parent's (argv[1]).
_BOOTSTRAP = (
    "import json, sys; sys.path.extend(p for p in json.loads(sys.argv[1]) if p not in sys.path);"
    " import {module}; {module}.main()"
)


def isolated_command(module: str, worker_command: Sequence[str] | None = None) -> list[str]:
    """What starts `module`'s main() isolated as run_child() isolates its functions; arguments may follow.

    worker_command: as in run_child. Raises BackendError where sys.executable is no Python interpreter.
    """
    if worker_command:
        return list(worker_command)
    paths = json.dumps(_search_path())
    return [*_interpreter(), "-I", "-c", _BOOTSTRAP.format(module=module), paths]


_ADVICE = "pass worker_command=[...], a command that starts pocketllava's worker"


def _named(command: Sequence[str]) -> str:
    return printable(command[0])[:200] or "worker_command"


def _interpreter() -> list[str]:
    """sys.executable. Raises BackendError where it cannot be a Python interpreter."""
    executable = sys.executable
    if not executable or getattr(sys, "frozen", False) or not Path(executable).is_file():
        state = "a frozen application" if getattr(sys, "frozen", False) else "no Python interpreter"
        raise BackendError(f"sys.executable: found {executable!r}, {state}; {_ADVICE}")
    return [executable]


def _search_path() -> list[str]:
    """The parent's absolute folders but for the current one; last, the folder that holds this package."""
    paths = [path for path in sys.path if Path(path).is_absolute() and not _is_current(path)]
    return [*paths, str(Path(__file__).absolute().parents[2])]


def _is_current(path: str) -> bool:
    try:
        return Path(path).samefile(Path.cwd())
    except OSError:
        return False


def of_its_own() -> dict[str, Any]:
    """Popen's settings for a child that no terminal's Ctrl-C reaches, and that shows no window: its parent ends it."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NO_WINDOW}
    return {"start_new_session": True}


def speak_utf8() -> None:
    """In the child, whose parent reads UTF-8: without PYTHON* variables, Windows gives it another encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def isolated_environment() -> Mapping[str, str]:
    """The parent's, without PYTHON* variables."""
    return {name: value for name, value in os.environ.items() if not name.upper().startswith("PYTHON")}


def _run(command: Sequence[str], task: bytes, folder: str, timeout_s: float) -> tuple[int | None, str, str]:
    """(exit code, or None after a timeout; the ends of stdout and stderr). Raises OSError."""
    pipe, ends = subprocess.PIPE, (bytearray(), bytearray())
    process = subprocess.Popen(
        command,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        cwd=folder,
        env=isolated_environment(),
        **of_its_own(),
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    streams = (process.stdout, process.stderr)
    pairs = zip(streams, ends, strict=True)
    readers = [threading.Thread(target=keep_end, args=pair, daemon=True) for pair in pairs]
    try:  # from here on: Ctrl-C while a reader starts would leave a child that waits, and readers that wait for it
        for reader in readers:
            reader.start()
        with contextlib.suppress(OSError), process.stdin:  # a child that reads nothing may be gone
            process.stdin.write(task)
        exit_code: int | None = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        exit_code = None
    finally:
        process.kill()
        process.wait()
        for reader, stream in zip(readers, streams, strict=True):
            with contextlib.suppress(RuntimeError):  # one that was not started
                reader.join()
            stream.close()
    stdout, stderr = (bytes(end).decode("utf-8", "replace") for end in ends)
    return exit_code, stdout, stderr


def keep_end(stream: IO[bytes], end: bytearray) -> None:
    """Read to the end of a stream, keeping its last bytes."""
    while block := os.read(stream.fileno(), MAX_OUTPUT_BYTES):
        end += block
        del end[:-MAX_OUTPUT_BYTES]


def last_line(text: str) -> str:
    """The last line with words in it, or ggml's last assertion, printable and without folders of source files."""
    lines = [line.strip() for line in map(printable, text.splitlines()) if line.strip()]
    asserted = [line for line in lines if "GGML_ASSERT" in line]
    line = (asserted or lines or [""])[-1][
        : 2 * MAX_LINE
    ]  # before the pattern, whose time grows with its square
    return SOURCE_FILE.sub("", line)[:MAX_LINE]


def printable(text: str) -> str:
    """The text with a space for every character that a terminal cannot show or might obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def perform(task: Mapping[str, Any]) -> None:
    """In the child: call the task's function and print each answer behind the token. Exits 1 with one line."""
    module, _, name = task["function"].partition(":")
    try:
        result = getattr(importlib.import_module(module), name)(*task["arguments"])
        for answer in result if isinstance(result, Iterator) else [result]:
            sys.stdout.write(f"\n{task['token']}{json.dumps(answer)}\n")
            sys.stdout.flush()
    except PocketLlavaError as error:
        raise SystemExit(str(error)) from None


def main() -> None:
    """A worker's entry: one task on stdin, as JSON."""
    speak_utf8()
    perform(json.loads(sys.stdin.buffer.read()))


if __name__ == "__main__":
    main()

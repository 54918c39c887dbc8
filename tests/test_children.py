"""Child processes: isolated from the current folder, bounded, and believed only with the token they were given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from pocketllava import BackendError, Bundle, ConvertError
from pocketllava.convert import convert
from pocketllava.llamacpp import children
from pocketllava.llamacpp.children import run_child

CONSOLE = Path(sysconfig.get_path("scripts")) / ("pocketllava.exe" if os.name == "nt" else "pocketllava")
HOSTILE = ("queue", "numpy", "random", "gguf", "llama_cpp", "json", "pocketllava")
MARKER = "executed"
MODULE = """
import ctypes, os, sys

def where():
    names = [n for n in os.environ if n.startswith("PYTHON")]
    return {"cwd": os.getcwd(), "files": os.listdir(), "python": names, "isolated": sys.flags.isolated}

def echo(*arguments):
    return list(arguments)

def fail():
    raise SystemExit("first\\nit does not\\x1b[31m work")

def refuse():
    from pocketllava import BackendError
    raise BackendError("no such file")

def crash():
    ctypes.string_at(0)

def assertion():
    sys.stderr.write("/home/builder/llama.cpp/ggml/src/ggml.c:12: GGML_ASSERT(a == b) failed\\nlater words\\n")
    sys.stderr.flush()
    os.abort()

def flood():
    block = "x" * 65536 + "\\n"
    for _ in range(200):
        sys.stdout.write(block); sys.stderr.write(block)
    return True

def several():
    yield 1
    yield 2
    os.abort()

def hang():
    import time
    time.sleep(60)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that the parent can import, from a folder of its own."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "some_worker.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    return "some_worker"


def test_it_runs_in_an_empty_folder_without_pythons_variables(
    worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    place = run_child(f"{worker}:where").answer
    assert place["files"] == []
    assert place["python"] == []
    assert place["isolated"] == 1
    assert not Path(place["cwd"]).exists()  # it is gone with the child


def test_arguments_are_text_and_absolute_paths(
    worker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_child(f"{worker}:echo", Path("a b.gguf"), "a b.gguf")
    assert result.answer == [str(tmp_path / "a b.gguf"), "a b.gguf"]
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("fail", "exit code 1: it does not [31m work"),
        ("refuse", "exit code 1: no such file"),
        ("absent", "exit code 1: AttributeError: module 'some_worker' has no attribute 'absent'"),
    ],
)
def test_how_it_failed_is_one_line(worker: str, function: str, reason: str) -> None:
    result = run_child(f"{worker}:{function}")
    assert result.answer is None
    assert result.reason == reason


@pytest.mark.skipif(os.name != "posix", reason="signals have names")
def test_a_signal_is_named_and_folders_of_sources_are_not(worker: str) -> None:
    crashed = run_child(f"{worker}:crash")
    assert crashed.exit_code == -signal.SIGSEGV
    assert crashed.reason == "signal SIGSEGV: without a message"
    asserted = run_child(f"{worker}:assertion")
    assert asserted.reason == "signal SIGABRT: ggml.c:12: GGML_ASSERT(a == b) failed"


def test_the_last_answer_before_a_crash_counts(worker: str) -> None:
    result = run_child(f"{worker}:several")
    assert result.answer == 2
    assert result.exit_code not in (0, None)


def test_its_output_is_bounded(worker: str) -> None:
    result = run_child(f"{worker}:flood")
    assert result.answer is True
    assert len(result.last_line) == children.MAX_LINE


def test_it_is_ended_after_a_while(worker: str) -> None:
    start = time.monotonic()
    result = run_child(f"{worker}:hang", timeout_s=1)
    assert time.monotonic() - start < 30
    assert (result.answer, result.exit_code, result.ending) == (None, None, "no answer in time")


@pytest.mark.parametrize("executable", ["", None, "/nowhere/python"])
def test_no_interpreter(executable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(
        BackendError, match=r"no Python interpreter; pass worker_command=\[\.\.\.\]"
    ) as caught:
        run_child("json:dumps", "x")
    assert "\n" not in str(caught.value)


def test_a_frozen_application(worker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(BackendError, match="a frozen application; pass worker_command"):
        run_child(f"{worker}:where")


@pytest.mark.skipif(os.name != "posix", reason="/bin/true")
def test_a_program_that_ends_well_verifies_nothing(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = next(path for path in ("/bin/true", "/usr/bin/true") if Path(path).exists())
    monkeypatch.setattr(sys, "executable", true)
    with pytest.raises(ConvertError, match=r"true: ended without an answer, expected a Python interpreter"):
        convert(make_checkpoint(), tmp_path / "b", quant="F16")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BackendError, match="cannot be run"):
        run_child("json:dumps", "x", worker_command=["/nowhere/python"])


def test_a_worker_of_ones_own(make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-I", "-m", "pocketllava.llamacpp.children"]
    monkeypatch.setattr(sys, "executable", "")
    bundle = convert(make_checkpoint(), tmp_path / "b", quant="F16", worker_command=command)
    assert Bundle.open(tmp_path / "b").manifest == bundle.manifest


def hostile_folder(folder: Path) -> Path:
    """A folder with modules of other modules' names, which leave a marker when they are executed."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder.parent / MARKER
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write({name!r} + '\\n')\n")
    return folder


def run_in(folder: Path, *arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """The console script, with that folder as the current one and a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"XDG_CACHE_HOME": str(cache), "LOCALAPPDATA": str(cache), "HOME": str(cache)}
    return subprocess.run(
        [str(CONSOLE), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_hostile_folder_works(tmp_path: Path) -> None:
    """`python -c` does import from the current folder: a marker would be seen."""
    folder = hostile_folder(tmp_path / "checkpoint")
    subprocess.run([sys.executable, "-c", "import queue"], cwd=folder, capture_output=True, check=False)
    assert (tmp_path / MARKER).exists()


@pytest.mark.parametrize("command", ["convert", "quantize", "repair", "demo"])
def test_modules_in_the_current_folder_are_not_executed(
    command: str, make_checkpoint: Any, bundle: Bundle, tmp_path: Path
) -> None:
    folder, out = hostile_folder(tmp_path / "checkpoint"), str(tmp_path / "out")
    if command == "convert":
        for file in make_checkpoint().iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        arguments = ["convert", ".", "--out", out, "--quant", "Q4_0"]
    elif command == "quantize":
        for file in bundle.folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        arguments = ["quantize", ".", "--out", out, "--quant", "Q4_0"]
    elif command == "repair":
        data = bundle.mmproj.read_bytes()
        (folder / "mmproj.gguf").write_bytes(
            data.replace(b"clip.vision.feature_layer", b"note.vision.feature_layer")
        )
        arguments = ["convert", "--repair", "."]
    else:
        arguments = ["demo"]
    done = run_in(folder, *arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / MARKER).exists(), (tmp_path / MARKER).read_text()
    if command == "repair":
        assert "features of a drawn picture: moved by" in done.stdout
    elif command != "demo":
        assert json.loads((tmp_path / "out" / "bundle.json").read_text())["types"]["model"] == "Q4_0"


def test_an_interrupt_while_a_child_starts_leaves_nothing() -> None:
    """Where its readers are being started: nobody would end the child, and the readers would wait for it for ever."""
    program = (
        "import threading\n"
        "from pocketllava.llamacpp import children\n"
        "start = threading.Thread.start\n"
        "def interrupted(thread):\n"
        "    start(thread)\n"
        "    raise KeyboardInterrupt\n"
        "threading.Thread.start = interrupted\n"
        "children.run_child('builtins:len', 'x')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert done.stderr.splitlines()[-1] == "KeyboardInterrupt"

"""Windows and macOS, as far as Linux can show them: files in use, encodings, paths, cores, consoles.

windows_files() enforces Windows' rules about open and mapped files; what the platform says is replaced where it is
asked for, never what this package makes of it.
"""

from __future__ import annotations

import ctypes
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from machines import GIGA, machine
from pictures import scene
from windows import windows_files

from pocketllava import Bundle, ImageError, InputError, Llava, ModelNotFound
from pocketllava.album.database import uri
from pocketllava.cli import cli
from pocketllava.convert import convert
from pocketllava.convert.adopt import found
from pocketllava.convert.repair import examine, repair
from pocketllava.download.choice import source
from pocketllava.errors import BackendError, ConvertError
from pocketllava.llamacpp import children, devices
from pocketllava.llamacpp.library import DeviceProps, ggml
from pocketllava.llamacpp.private import private, set_fields
from pocketllava.llamacpp.text_model import load_model
from pocketllava.measure.feature_drift import tiny_text_model
from pocketllava.models import files
from pocketllava.models.blob_cache import BlobCache
from pocketllava.models.files import atomic_write, move
from pocketllava.models.machine import Device
from pocketllava.models.plan import plan
from pocketllava.models.store import Store
from pocketllava.names import open_bundle
from pocketllava.types import LoadOptions
from pocketllava.vision import sources

CPU_TYPE = 0  # enum ggml_backend_dev_type
MIB = 1 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc who has a file open")
DRIVES = (r"C:\m\x.gguf", "C:/m/x.gguf", "C:x.gguf", "C:", "c:q8_0", r"\\host\share\x.gguf", "//host/share/x.gguf",
          r"\\?\C:\m\x.gguf")  # fmt: skip


@pytest.fixture
def windows() -> Iterator[None]:
    with windows_files():
        yield


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle's folder of this test's own."""
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mapped(folder: Path) -> Llava:
    return Llava.load(folder, n_ctx=256, n_threads=1, weights="mapped")


# Files that are open or mapped


@LINUX
@pytest.mark.usefixtures("windows")
def test_the_pretended_rules_are_windows(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    with path.open("rb"):
        for forbidden in (path.unlink, lambda: path.replace(tmp_path / "b"), lambda: shutil.rmtree(tmp_path)):
            with pytest.raises(PermissionError):
                forbidden()
    path.replace(tmp_path / "b")
    (tmp_path / "b").unlink()


@LINUX
@pytest.mark.usefixtures("windows")
def test_a_model_that_is_loaded_stays_whole_whatever_is_to_replace_it(
    copy: Path, make_checkpoint: Any
) -> None:
    before = content(copy)
    with mapped(copy) as model:
        expected = model.ask(None, "What?", max_tokens=4).token_ids
        with pytest.raises(ConvertError, match=r"in use"):
            convert(make_checkpoint(), copy, quant="Q8_0", force=True)
        assert content(copy) == before
        assert model.ask(None, "What?", max_tokens=4).token_ids == expected
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    assert convert(make_checkpoint(), copy, quant="Q8_0", force=True).manifest.types.model == "Q8_0"


@LINUX
@pytest.mark.usefixtures("windows")
def test_a_bundle_that_is_opened_during_its_conversion_loses_nothing(
    copy: Path, make_checkpoint: Any
) -> None:
    before, models = content(copy), []

    def load(*_: object) -> None:
        models.extend([] if models else [mapped(copy)])

    with pytest.raises(ConvertError, match="the new bundle is in") as error:
        convert(make_checkpoint(), copy, quant="Q8_0", force=True, progress=load)
    assert content(copy) == before
    finished = Path(re.search(r"is in (\S+)", str(error.value))[1])  # type: ignore[index]
    models[0].close()
    shutil.rmtree(copy)
    finished.replace(copy)
    assert Bundle.open(copy).manifest.types.model == "Q8_0"


@LINUX
@pytest.mark.usefixtures("windows")
def test_a_store_s_model_that_another_program_has_open_is_not_half_removed(
    bundle: Bundle, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    with store.create("llava") as staging:
        shutil.copytree(bundle.folder, staging, dirs_exist_ok=True)
    with (store.folder("llava") / "model.gguf").open("rb"):
        with pytest.raises(InputError, match="close what has its files open"):
            store.remove("llava")
        assert Bundle.open(store.folder("llava")).text_info
    store.remove("llava")
    assert store.names() == []


@LINUX
@pytest.mark.usefixtures("windows")
def test_a_projector_that_is_in_use_is_not_repaired_in_place(bundle: Bundle, tmp_path: Path) -> None:
    path = Path(shutil.copy(bundle.mmproj, tmp_path / "mmproj.gguf"))
    before = path.read_bytes()
    with path.open("rb"), pytest.raises(ConvertError, match="cannot be written"):
        repair(examine(path), path, force=True)
    assert path.read_bytes() == before


@LINUX
@pytest.mark.usefixtures("windows")
def test_a_blob_that_another_process_reads_is_kept_and_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = BlobCache(tmp_path, 100)
    cache.put("a", b"1" * 20)
    with (tmp_path / "a.cached").open("rb"):
        cache.put("a", b"1" * 20)
        cache.put("b", b"2" * 90)  # drops a, as soon as it may
    assert bytes(cache.get("a") or b"") == b"1" * 20
    assert not caplog.messages
    assert not list(tmp_path.glob("*.part"))


@LINUX
@pytest.mark.usefixtures("windows")
def test_a_text_beside_a_picture_that_an_editor_has_open_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "photo.txt"
    path.write_text("mine", "utf-8")
    with path.open("rb"), pytest.raises(PermissionError), atomic_write(path) as part:
        part.write_text("theirs", "utf-8")
    assert [(p.name, p.read_text("utf-8")) for p in tmp_path.iterdir()] == [("photo.txt", "mine")]


def test_a_rename_waits_for_a_virus_scanner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = iter([PermissionError(13, "scanned"), PermissionError(13, "scanned")])
    real = os.replace

    def replace(old: Any, new: Any) -> None:
        for error in refusals:
            raise error
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files, "PATIENCE_S", 1.0)
    (tmp_path / "a").write_bytes(b"1")
    move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"1"


@LINUX
def test_the_text_model_of_a_measurement_is_not_mapped(tmp_path: Path) -> None:
    path = tiny_text_model(tmp_path / "tiny.gguf", 64)
    assert load_model(path)
    assert str(path) not in Path("/proc/self/maps").read_text("utf-8")


def test_a_field_that_a_structure_lacks_is_not_set_in_silence() -> None:
    from llama_cpp import llama_cpp

    params = llama_cpp.llama_model_default_params()
    set_fields(params, n_gpu_layers=3)
    assert params.n_gpu_layers == 3
    with pytest.raises(BackendError, match=r"no llama_model_params.use_mmap"):
        set_fields(params, use_mmap=False)


# Encodings


@pytest.mark.slow
def test_every_command_writes_utf8_whatever_the_code_page(tmp_path: Path) -> None:
    name = "größe ☃ 猫"
    folder, home = tmp_path / name, tmp_path / "home"
    folder.mkdir()
    picture = folder / f"{name}.png"
    scene(96, 80).save(picture)
    commands = (
        ["ask", "demo", str(picture), "What is this?", "--prefill", name, "--json"],
        ["ask", "demo", str(folder / f"no {name}.png"), "What is this?"],
        ["caption", "demo", str(folder)],
        ["caption", "demo", str(folder), "--to", "csv", "--quiet"],
        ["find", name, "--album", str(tmp_path / f"{name}.album")],
        ["plan", str(folder)],
        ["inspect", "demo", "--image", str(picture)],
        ["rm", name],
        ["serve", str(folder)],
        ["convert", str(folder), "--out", str(tmp_path / "out")],
    )
    spoken = b""
    for arguments in commands:
        done = legacy(*arguments, home=home)
        assert b"Traceback" not in done.stderr, (arguments, done.stderr)
        spoken += done.stdout + done.stderr
    assert spoken.decode("utf-8").count(name) >= 6


def legacy(*arguments: str, home: Path) -> subprocess.CompletedProcess[bytes]:
    """A command as Windows starts one with its output in a pipe: in the code page of western Europe."""
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "cp1252",
        "PYTHONUTF8": "0",
        "POCKETLLAVA_HOME": str(home),
    }
    command = [sys.executable, "-m", "pocketllava", *arguments]
    return subprocess.run(command, capture_output=True, env=environment, check=False, timeout=120)


def test_every_help_fits_the_code_page() -> None:
    """It may be shown by programs that decode it so."""
    for name in cli.commands:
        shown = CliRunner().invoke(cli, [name, "--help"])
        assert shown.exit_code == 0
        shown.output.encode("cp1252")


def test_a_child_speaks_utf8_whatever_it_was_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, "cp1252"))
    children.speak_utf8()
    print("猫.gguf: not found", file=sys.stderr, flush=True)
    assert raw.getvalue().decode("utf-8") == "猫.gguf: not found\n"


# Paths


@pytest.mark.parametrize("name", DRIVES)
def test_a_drive_or_a_server_is_a_path_and_nothing_else(name: str) -> None:
    for opened in (lambda: open_bundle(name), lambda: found(name, None, [])):
        with pytest.raises(ModelNotFound, match="found nothing") as error:
            opened()
        assert str(error.value).startswith(f"{name}: ")
        assert "Hugging Face" not in str(error.value)
    with pytest.raises(InputError, match="of a folder on this machine `pocketllava convert`"):
        source(name)


def test_names_with_colons_are_told_from_drives() -> None:
    store = Store(Path())
    assert store.folder("llava:q8_0").name == "llava@q8_0"
    for name in ("c:q8_0", "C:", "con", "nul:q4_0"):
        with pytest.raises(InputError):
            store.folder(name)
    with pytest.raises(ModelNotFound, match="Ollama has no such model"):
        found("ollama:llava:7b", None, [])


@pytest.mark.parametrize("name", [r"C:\pic.png", "C:/pic.png", "d:pic.png", r"\\host\share\pic.png"])
def test_a_picture_on_a_drive_is_a_file(name: str) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        sources.read(name)


def test_an_album_on_a_server_is_opened_by_sqlite() -> None:
    assert uri(PureWindowsPath(r"\\host\share\my photos.album")) == "file:////host/share/my%20photos.album"
    assert uri(PureWindowsPath(r"C:\photos\a?.album")) == "file:///C%3A/photos/a%3F.album"
    assert uri(PurePosixPath("/photos/a#b.album")) == "file:///photos/a%23b.album"


# Processors and consoles


def without_affinity(monkeypatch: pytest.MonkeyPatch, platform: str, physical: int | None) -> None:
    """A platform of 8 hyper-threads without Linux's calls."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else physical)


@pytest.mark.parametrize(("physical", "allowed", "expected"), [(6, 8, 6), (6, 2, 2), (None, 8, 4), (8, 8, 8)])
def test_hyper_threads_are_not_cores_on_windows(
    monkeypatch: pytest.MonkeyPatch, physical: int | None, allowed: int, expected: int
) -> None:
    without_affinity(monkeypatch, "win32", physical)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _self: list(range(allowed)))
    assert devices.cores.__wrapped__() == expected


@pytest.mark.parametrize(("answer", "expected"), [(b"4\n", 4), (b"", 6), (None, 6)])
def test_the_fast_cores_count_on_macos(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, expected: int
) -> None:
    """None: there is no sysctl."""
    without_affinity(monkeypatch, "darwin", 6)
    monkeypatch.delattr(psutil.Process, "cpu_affinity", raising=False)

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        if answer is None:
            raise FileNotFoundError(2, "no such file", command[0])
        return subprocess.CompletedProcess(command, 0, answer)

    monkeypatch.setattr(subprocess, "run", run)
    assert devices.cores.__wrapped__() == expected


def test_a_child_opens_no_console_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "CREATE_NO_WINDOW", 0x08000000, raising=False)
    assert children.of_its_own() == {"creationflags": 0x08000000}


@pytest.mark.skipif(os.name == "nt", reason="sessions")
@pytest.mark.slow
def test_a_terminal_s_ctrl_c_does_not_reach_the_engine() -> None:
    before = set(psutil.Process().children())  # servers of other files' tests
    with Llava.load("demo", n_ctx=256, isolated=True) as model:
        (engine,) = set(psutil.Process().children()) - before
        assert os.getsid(engine.pid) == engine.pid != os.getsid(0)
        assert model.loaded


WITHOUT_POSIX = """
import importlib, os, pkgutil, signal, sys
import asyncio, concurrent.futures, subprocess, tempfile, filelock, multiprocessing, platformdirs, psutil
import PIL.Image, click, jinja2, llama_cpp, numpy, prompt_toolkit.shortcuts, starlette, tqdm, uvicorn
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"):
            raise ModuleNotFoundError(name)
for name in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Hidden())
for module, names in ((signal, "SIGKILL SIGHUP SIGUSR1 SIGALRM"), (os, "fork mkfifo getuid geteuid getsid killpg pread"
    " posix_fadvise sched_getaffinity O_NONBLOCK memfd_create fdatasync")):
    for name in names.split():
        delattr(module, name)
import pocketllava
for module in pkgutil.walk_packages(pocketllava.__path__, "pocketllava."):
    if ".integrations" not in module.name and ".training" not in module.name and "__main__" not in module.name:
        importlib.import_module(module.name)
print(sum(name.startswith("pocketllava.") for name in sys.modules))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="has none of them")
def test_every_module_is_imported_without_what_windows_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


# Memory that a GPU shares with the machine


@pytest.mark.parametrize(
    ("layers", "maps", "in_memory"), [(-1, True, False), (-1, False, True), (0, False, False)]
)
def test_weights_are_mapped_where_llama_cpp_s_own_choice_maps_them(
    bundle: Bundle, layers: int, maps: bool, in_memory: bool
) -> None:
    """LLAMA_LOAD_MODE_AUTO: for Metal and cards, not for integrated GPUs of Vulkan, CUDA and OpenCL."""
    device = Device("Vulkan0 (integrated)", 8 * GIGA, 8 * GIGA, unified=True, maps=maps)
    planned = plan(bundle, LoadOptions(n_gpu_layers=layers), replace(machine(), devices=(device,)))
    assert planned.in_memory == in_memory
    assert plan(bundle, LoadOptions(weights="mapped"), planned.machine).in_memory is False


def test_a_shared_memory_that_is_short_is_said(bundle: Bundle) -> None:
    """The device itself would have room: it is the same memory."""
    here = machine(free=MIB, gpu=8 * GIGA, unified=True)
    assert plan(bundle, LoadOptions(n_gpu_layers=99), here).verdict != "fits"


def test_what_a_device_can_do_is_read_where_ggml_writes_it() -> None:
    ggml_library, props = private("llama_cpp._ggml", "libggml"), DeviceProps()
    ggml_library.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    cpu = ctypes.c_void_p(ggml_library.ggml_backend_dev_by_type(CPU_TYPE))
    ggml().ggml_backend_dev_get_props(cpu, ctypes.byref(props))
    caps = props.caps
    found = (caps.asynchronous, caps.host_buffer, caps.buffer_from_host_ptr, caps.events, caps.mmap_support)
    assert found == (False, False, True, False, True)  # ggml-cpu.cpp
    assert props.type == CPU_TYPE
    assert props.name == b"CPU"


# What people run


def test_the_workflow_calls_the_targets_of_the_makefile_on_three_systems() -> None:
    root = Path(__file__).parent.parent
    workflow = (root / ".github/workflows/ci.yml").read_text("utf-8")
    makefile = (root / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+)(?: [a-z -]+)?:(?!=)", makefile, re.M)) | {"test"}
    assert set(re.findall(r"run: make (.+)", workflow)) <= targets
    assert not re.findall(r"run: (?!make |bash)(.+)", workflow.replace("run:\n", ""))
    assert re.search(r"os: \[ubuntu-latest, macos-latest, windows-latest\]", workflow)
    assert "workflow_dispatch:" in workflow


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_makefile_finds_windows_programs() -> None:
    root = Path(__file__).parent.parent
    command = ["make", "--dry-run", "--always-make", "OS=Windows_NT", "check"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "python -m venv .venv\n" in shown
    assert ".venv/Scripts/ruff check ." in shown
    assert "/bin/" not in shown

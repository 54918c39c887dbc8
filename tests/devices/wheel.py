"""llama-cpp-python with its Vulkan backend: built once a version, in a folder and an environment of its own.

Never in pip's cache, where a later `pip install llama-cpp-python` would take it for the CPU's. Knows how that is built;
nothing of what is run with it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import venv
from pathlib import Path

from devices.machine import headers_version

VERSION = os.environ.get("LLAMA_CPP_PYTHON", "0.3.36")
LAYER_SETTINGS = 272  # Vulkan headers from 1.3.272 on have VK_EXT_layer_settings
SOURCE = "vendor/llama.cpp/ggml/src/ggml-vulkan/ggml-vulkan.cpp"
# From the extension's settings, which only debugging uses, to the instance that they are chained to.
SETTINGS = re.compile(
    r"    VkBool32 enable_best_practice = layer_settings;.*?vk::InstanceCreateInfo instance_create_info\(.*?\);\n",
    re.DOTALL,
)
PLAIN = (
    "vk::InstanceCreateInfo instance_create_info(vk::InstanceCreateFlags{}, &app_info, layers, extensions);"
)
STEP = re.compile(r"\[(\d+)/(\d+)\]")  # ninja's
SAY_EVERY_S = 60


def wheel(folder: Path) -> Path:
    """The wheel that POCKETLLAVA_DEVICE_WHEEL names, the one in the folder, or a new one there."""
    if given := os.environ.get("POCKETLLAVA_DEVICE_WHEEL"):
        if not Path(given).is_file():
            sys.exit(f"POCKETLLAVA_DEVICE_WHEEL: found no file {given}, expected a wheel of llama-cpp-python")
        return Path(given).resolve()
    found = sorted((folder / "wheels").glob("*.whl"))
    return found[0] if found else build(folder)


def build(folder: Path) -> Path:
    """Download the source, make it fit old headers, build with two jobs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"llama-cpp-python {VERSION}: downloading the source", flush=True)
    pip = [sys.executable, "-m", "pip"]
    wanted = ["--no-binary", "llama-cpp-python", "--no-deps", f"llama-cpp-python=={VERSION}"]
    # Metadata of a source is prepared by its build, which wants no compiler yet.
    subprocess.run([*pip, "download", "--quiet", "--no-cache-dir", "-d", folder, *wanted], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        archive.extractall(folder / "source")
    source = next((folder / "source").iterdir())
    if headers_version() < LAYER_SETTINGS:
        fit_old_headers(source / SOURCE)
    command = [*pip, "wheel", "-v", "--no-cache-dir", "--no-deps", "-w", str(folder / "part"), str(source)]
    _say_progress(command, folder / "build.log")
    shutil.rmtree(folder / "source")
    (folder / "part").rename(folder / "wheels")  # only a whole one is found next time
    return next((folder / "wheels").glob("*.whl"))


def fit_old_headers(file: Path) -> None:
    """Leave out the settings of validation layers: Debian 12's headers (1.3.239) do not have the extension."""
    text, n = SETTINGS.subn(f"    {PLAIN}\n", file.read_text("utf-8"))
    if n != 1:
        sys.exit(
            f"{file.name}: found {n} places that set up layers, expected 1; install Vulkan headers 1.3.272 or later"
        )
    file.write_text(text, "utf-8")


def _say_progress(command: list[str], log: Path) -> None:
    """Run a build, its output in a log, and say once a minute how far it is."""
    environment = {**os.environ, "CMAKE_ARGS": "-DGGML_VULKAN=on", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    start = said = time.monotonic()
    print(f"building with two jobs, 15 to 40 minutes; {log}", flush=True)
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            out.write(line)
            if (step := STEP.search(line)) and time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                print(f"  {step[1]} of {step[2]} steps after {(said - start) / 60:.0f} minutes", flush=True)
    if child.returncode:
        sys.exit(f"the build failed with exit status {child.returncode}: the end of {log} says why")
    print(f"  built in {(time.monotonic() - start) / 60:.0f} minutes", flush=True)


def environment_of(folder: Path, wheel: Path) -> Path:
    """The Python of a virtual environment with the wheel, this package and what its tests need."""
    home, stamp = folder / "venv", folder / "venv" / "wheel"
    python = home / "bin" / "python"
    now = f"{wheel.name} {wheel.stat().st_mtime_ns}"
    if not stamp.exists() or stamp.read_text() != now:
        print(f"a virtual environment with {wheel.name}", flush=True)
        venv.create(home, with_pip=True, clear=True)
        _pip(python, str(wheel))
    # Every time: a new file in a room needs a new link tree.
    _pip(python, "-e", ".[dev]")
    stamp.write_text(now)
    return python


def _pip(python: Path, *wanted: str) -> None:
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)


def shim(folder: Path) -> Path:
    """small_device.c as a library to preload."""
    out = folder / "small_device.so"
    source = Path(__file__).with_name("small_device.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(out), str(source), "-ldl"], check=True)
    return out

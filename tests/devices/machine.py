"""What this machine must have to pretend a GPU: Mesa's llvmpipe, a Vulkan loader, and what builds a wheel for it.

Knows where Linux keeps these; nothing of llama.cpp but the environment variables of its Vulkan backend.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

DRIVERS = ("/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/etc/vulkan/icd.d")
PACKAGES = "mesa-vulkan-drivers libvulkan-dev glslc spirv-headers g++"  # Debian's and Ubuntu's names


def missing(builds: bool) -> list[str]:
    """What is not here, for a run that also builds the wheel or that is given one."""
    found: dict[str, object] = {
        "Linux (LD_PRELOAD and Mesa's llvmpipe)": sys.platform == "linux",
        "a Vulkan loader (libvulkan.so.1)": ctypes.util.find_library("vulkan"),
        "Mesa's llvmpipe driver (lvp_icd*.json)": driver(),
        "a C compiler (cc)": shutil.which("cc"),
        "Vulkan's headers (vulkan/vulkan.h)": headers_version(),
    }
    if builds:
        found |= {
            "a C++ compiler (c++)": shutil.which("c++"),
            "the shader compiler glslc": shutil.which("glslc"),
            "SPIRV-Headers for cmake": _cmake_package("SPIRV-Headers"),
        }
    return [name for name, it in found.items() if not it]


def driver() -> Path | None:
    """llvmpipe's description for the loader."""
    return next((file for folder in DRIVERS for file in sorted(Path(folder).glob("lvp_icd*.json"))), None)


def headers_version() -> int:
    """VK_HEADER_VERSION, the last part of 1.3.239; 0 without headers or a compiler."""
    source = "#include <vulkan/vulkan.h>\nVK_HEADER_VERSION\n"
    if not shutil.which("cc"):
        return 0
    done = subprocess.run(["cc", "-E", "-P", "-"], input=source, capture_output=True, text=True, check=False)
    last = (done.stdout.split() or [""])[-1]
    return int(last) if done.returncode == 0 and last.isdigit() else 0


def _cmake_package(name: str) -> bool:
    """Whether cmake would find the package in a system's folders, or where CMAKE_PREFIX_PATH points."""
    roots = ["/usr", "/usr/local", *os.environ.get("CMAKE_PREFIX_PATH", "").replace(";", ":").split(":")]
    if sdk := os.environ.get("VULKAN_SDK"):
        roots.append(sdk)
    found = (Path(root) / part / name for root in roots if root for part in ("share/cmake", "lib/cmake"))
    return any(folder.is_dir() for folder in found) or any(
        Path("/usr/lib").glob(f"*/cmake/{name}")  # /usr/lib/x86_64-linux-gnu/cmake
    )


def environment(folder: Path, exact: bool = True) -> dict[str, str]:
    """Variables for processes that are to see llvmpipe as their one GPU; exact: which sums in F32 whatever is asked.

    Only that driver is loaded, so a real GPU stays out of it; naming device 0 has ggml show one of the type CPU.
    Compiled shaders stay in the folder, for tests have homes of their own.
    """
    unset = ("GGML_VK_DISABLE_F16", "LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return {
        **kept,
        "VK_DRIVER_FILES": str(driver()),
        "VK_ICD_FILENAMES": str(driver()),  # its name before loader 1.3.207
        "GGML_VK_VISIBLE_DEVICES": "0",
        "GGML_NO_BACKTRACE": "1",
        # Flash attention of 2 to 8 tokens at once ends in libvulkan_lvp.so of Mesa 22.3.6, in the stock handler, too.
        "GGML_VK_DISABLE_FUSION": "1",
        "MESA_SHADER_CACHE_DIR": str(folder / "shaders"),
        **({"GGML_VK_DISABLE_F16": "1"} if exact else {}),
    }

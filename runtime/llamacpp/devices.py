"""What this build of llama.cpp can compute on: GPUs and their memory, the CPU's cores and instructions."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

import psutil

from pocketllava.llamacpp.library import ggml
from pocketllava.llamacpp.log import capture_log
from pocketllava.llamacpp.private import private
from pocketllava.models.machine import Device, Machine, rearranged_types, this_machine

INTEGRATED = 2
GPU_TYPES = (1, INTEGRATED)  # enum ggml_backend_dev_type: GPU, IGPU (ggml-backend.h)
METAL = ("MTL", "Metal")  # its names in llama.cpp


def gpus() -> list[str]:
    """Names of the GPUs that this build of llama.cpp can use, such as "CUDA0 (NVIDIA RTX 4070)"."""
    return [device.name for device in devices()]


def devices() -> tuple[Device, ...]:
    """The GPUs that this build of llama.cpp can use, with their memory as it is now."""
    import llama_cpp

    capture_log()
    if not llama_cpp.llama_supports_gpu_offload():
        return ()
    lib = private("llama_cpp._ggml", "libggml")
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype, lib.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    pointers = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
    return tuple(
        _device(p) for p in pointers if ggml().ggml_backend_dev_type(ctypes.c_void_p(p)) in GPU_TYPES
    )


def _device(pointer: int) -> Device:
    base, device = ggml(), ctypes.c_void_p(pointer)
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(base, name).restype = ctypes.c_char_p
    base.ggml_backend_dev_memory.restype = None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    name = base.ggml_backend_dev_name(device).decode()
    return Device(
        f"{name} ({base.ggml_backend_dev_description(device).decode()})",
        free.value,
        total.value,
        unified=base.ggml_backend_dev_type(device) == INTEGRATED or name.startswith(METAL),
    )


def cpu_features() -> frozenset[str]:
    """What ggml uses of this CPU, as llama.cpp names it: "AVX2", "REPACK"."""
    import llama_cpp

    words = llama_cpp.llama_print_system_info().decode("utf-8", "replace").replace("CPU :", "|").split("|")
    return frozenset(word.split("=")[0].strip() for word in words if word.strip().endswith("= 1"))


def machine(n_threads: int | None = None) -> Machine:
    """This machine, for plans (models/plan.py)."""
    return this_machine(n_threads or cores(), devices(), rearranged_types(cpu_features()))


@functools.lru_cache(maxsize=1)
def cores() -> int:
    """Physical cores that this process may use: what ggml's spinning threads want, at least 1.

    More threads than cores cost up to a factor of 100, so hyper-threads are not counted.
    """
    if hasattr(os, "sched_getaffinity"):
        return max(1, len({_siblings(cpu) for cpu in os.sched_getaffinity(0)}))
    if sys.platform == "darwin" and (fast := _sysctl("hw.perflevel0.physicalcpu")):  # not the efficient ones
        return fast
    physical = psutil.cpu_count(logical=False) or (os.cpu_count() or 2) // 2
    return max(1, min(physical, _allowed()))


def _allowed() -> int:
    """Hyper-threads that this process may run on."""
    try:
        return len(psutil.Process().cpu_affinity())  # Windows has it, macOS has no such thing
    except AttributeError:
        return os.cpu_count() or 1


def _sysctl(key: str) -> int:
    """A number of macOS's; 0 where it has none of that name."""
    try:
        found = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, check=False)
    except OSError:
        return 0
    return int(found.stdout) if found.stdout.strip().isdigit() else 0


def _siblings(cpu: int) -> str:
    """The hyper-threads that share a core with this one, as Linux writes them ("0,8")."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
    except OSError:
        return str(cpu)

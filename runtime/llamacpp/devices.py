"""What this build of llama.cpp can compute on: GPUs and their memory, the CPU's cores and instructions."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

import psutil

from pocketllava.errors import BackendError
from pocketllava.llamacpp.library import DeviceProps, ggml
from pocketllava.llamacpp.load_log import short_name
from pocketllava.llamacpp.log import capture_log
from pocketllava.llamacpp.private import private
from pocketllava.models.machine import Device, Machine, rearranged_types, this_machine

GPU, INTEGRATED = 1, 2  # enum ggml_backend_dev_type (ggml-backend.h)
METAL = ("MTL", "Metal")  # its names in llama.cpp


def gpus() -> list[str]:
    """Names of the devices that llama.cpp uses unless told otherwise, such as "CUDA0 (NVIDIA RTX 4070)"."""
    return [device.name for device in devices()]


def devices() -> tuple[Device, ...]:
    """The devices that llama.cpp uses unless told otherwise, in its order, with their memory as it is now.

    As llama_prepare_model_devices (llama.cpp) has it: one of two names for a card, and integrated GPUs where there is
    no other.
    """
    found = [(props, _device(address, props)) for address, props in _all()]
    cards: dict[object, Device] = {}
    for props, device in found:
        if props.type == GPU:
            cards.setdefault(props.device_id or device.name, device)
    integrated = [device for props, device in found if props.type == INTEGRATED]
    first = [device for device in integrated if device.backend == integrated[0].backend]
    return tuple(cards.values()) or tuple(first)


def address_of(name: str) -> int:
    """The ggml_backend_dev_t of a device, by its short name or Device.name. Raises BackendError."""
    for address, props in _all():
        if props.name.decode() == short_name(name):
            return address
    raise BackendError(f"{name}: this llama.cpp has no such device; `pocketllava doctor` lists them")


def _all() -> list[tuple[int, DeviceProps]]:
    """Address and properties of every GPU, in ggml's order."""
    import llama_cpp

    capture_log()
    if not llama_cpp.llama_supports_gpu_offload():
        return []
    lib, base = private("llama_cpp._ggml", "libggml"), ggml()
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype, lib.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    found = []
    for i in range(lib.ggml_backend_dev_count()):
        address, props = lib.ggml_backend_dev_get(i), DeviceProps()
        base.ggml_backend_dev_get_props(address, ctypes.byref(props))
        if props.type in (GPU, INTEGRATED):
            found.append((address, props))
    return found


def _device(address: int, props: DeviceProps) -> Device:
    name, backend = props.name.decode(), ggml().ggml_backend_dev_backend_reg(address)
    return Device(
        f"{name} ({props.description.decode()})",
        int(props.memory_free),
        int(props.memory_total),
        unified=props.type == INTEGRATED or name.startswith(METAL),
        backend=ggml().ggml_backend_reg_name(backend).decode(),
        maps=bool(props.caps.mmap_support),
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

"""What this build of llama.cpp can compute on: GPUs by name, and the CPU cores that its threads want."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from pathlib import Path

from pocketllava.llamacpp.library import ggml
from pocketllava.llamacpp.log import capture_log
from pocketllava.llamacpp.private import private

GPU_TYPES = (1, 2)  # enum ggml_backend_dev_type: GPU, IGPU (ggml-backend.h)


def gpus() -> list[str]:
    """Names of the GPUs that this build of llama.cpp can use, such as "CUDA0 (NVIDIA RTX 4070)"."""
    import llama_cpp

    capture_log()
    if not llama_cpp.llama_supports_gpu_offload():
        return []
    lib = private("llama_cpp._ggml", "libggml")
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype, lib.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    base = ggml()
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description"):
        getattr(base, name).restype, getattr(base, name).argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    devices = [lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())]
    return [
        f"{base.ggml_backend_dev_name(d).decode()} ({base.ggml_backend_dev_description(d).decode()})"
        for d in devices
        if base.ggml_backend_dev_type(d) in GPU_TYPES
    ]


@functools.lru_cache(maxsize=1)
def cores() -> int:
    """Physical cores that this process may use: what ggml's spinning threads want, at least 1.

    More threads than cores cost up to a factor of 100, so hyper-threads are not counted.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        siblings = {_siblings(cpu) for cpu in allowed}
        return max(1, len(siblings))
    if sys.platform == "darwin":
        for key in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            found = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
            if found.returncode == 0 and found.stdout.strip().isdigit():
                return max(1, int(found.stdout))
    return max(1, (os.cpu_count() or 2) // 2)


def _siblings(cpu: int) -> str:
    """The hyper-threads that share a core with this one, as Linux writes them ("0,8")."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text("ascii")
    except OSError:
        return str(cpu)

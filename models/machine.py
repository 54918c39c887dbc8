"""What a machine offers a model: memory that is free, limits on this process, and devices with memory of their own.

Knows figures; who reads those of GPUs and of the CPU's instructions is llamacpp/devices.py. Plans are made from it
(models/plan.py), for this machine or for any other that a test describes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import psutil

from pocketllava.models.limits import UNLIMITED, Limit, cgroup_limits, limits

# ggml's types that ggml-cpu/repack.cpp (and ggml-cpu/amx) computes with in another order, by what the CPU must have:
# Q4_0 2, Q4_1 3, Q8_0 8, Q2_K 10, Q4_K 12, Q5_K 13, Q6_K 14, IQ4_NL 20, IQ4_XS 23.
REARRANGED_BY = {
    "AVX2": {2, 12, 20},
    "AVX512": {10},
    "DOTPROD": {2, 8, 12, 13, 14, 20},
    "MATMUL_INT8": {2, 8, 12, 13, 14},
    "AMX_INT8": {2, 3, 8, 12, 13, 14, 23},
}
RELEASES_PAGES = sys.platform == "linux"  # llamacpp/pages.py


@dataclass(frozen=True)
class Device:
    """A GPU that this build of llama.cpp can use, and its memory in bytes.

    unified: it is the machine's own memory; backend: what of ggml drives it, such as "CUDA"; sums_in_f32: whether its
    products are as exact as the CPU's; maps: whether llama.cpp maps weights for it unless told otherwise.
    """

    name: str
    free: int
    total: int
    unified: bool = False
    backend: str = ""
    sums_in_f32: bool = True
    maps: bool = True

    @property
    def short_name(self) -> str:
        """ "CUDA0 (NVIDIA RTX 4070)" -> "CUDA0"."""
        return self.name.partition(" (")[0]

    @property
    def kind(self) -> str:
        """What computes the same bits on any machine, as far as this package knows."""
        description = self.name.removeprefix(self.short_name).strip(" ()")
        return f"{self.backend} {description} {'F32' if self.sums_in_f32 else 'F16'}"


@dataclass(frozen=True)
class Machine:
    """What there is. Bytes.

    free: memory that can be had without swapping; swap: free swap space; limits: what must not be exceeded;
    rearranged: ggml's types that the CPU computes with in another order; releases_pages: whether the pages of a mapped
    file are let go of once they are copied.
    """

    n_threads: int
    free: int
    swap: int = 0
    limits: tuple[Limit, ...] = ()
    devices: tuple[Device, ...] = ()
    rearranged: frozenset[int] = frozenset()
    releases_pages: bool = RELEASES_PAGES

    @property
    def cpu(self) -> str:
        """ "CPU, 8 threads"."""
        return f"CPU, {self.n_threads} thread{'s' if self.n_threads != 1 else ''}"


def this_machine(
    n_threads: int, devices: tuple[Device, ...] = (), rearranged: frozenset[int] = frozenset()
) -> Machine:
    """The machine that this process runs on, as it is now."""
    swap = psutil.swap_memory().free
    return Machine(n_threads, available_bytes(), swap, tuple(limits()), devices, rearranged)


def available_bytes() -> int:
    """Memory that this process can have without swapping."""
    return min(int(psutil.virtual_memory().available), *(left for _, left in cgroup_limits()), UNLIMITED)


def rearranged_types(features: frozenset[str]) -> frozenset[int]:
    """ggml's types that a CPU with these features computes with in another order. Without REPACK there are none."""
    if "REPACK" not in features:
        return frozenset()
    return frozenset().union(*(types for feature, types in REARRANGED_BY.items() if feature in features))

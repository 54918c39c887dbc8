"""Machines to plan for, whatever this one is; and what this one calls the place of a whole text model."""

from __future__ import annotations

from pocketllava.llamacpp.devices import gpus
from pocketllava.models.limits import Limit
from pocketllava.models.machine import Device, Machine, rearranged_types

GIGA = 10**9
AVX2 = frozenset({"AVX2", "REPACK"})
ARM = frozenset({"NEON", "DOTPROD", "MATMUL_INT8", "REPACK"})


def machine(
    free: int = 16 * GIGA,
    *,
    swap: int = 0,
    cpu: frozenset[str] = AVX2,
    gpu: int | None = None,
    unified: bool = False,
    limit: int | None = None,
    releases_pages: bool = True,
) -> Machine:
    """free, swap, gpu (free on a device) and limit (what an address space limit leaves) in bytes."""
    devices = (Device("GPU0 (a card)", gpu, gpu, unified),) if gpu is not None else ()
    limits = (Limit("RLIMIT_AS, ulimit -v", limit, True, True),) if limit is not None else ()
    return Machine(4, free, swap, limits, devices, rearranged_types(cpu), releases_pages)


def text_place() -> str:
    """How a timing line begins to say where a model's layers are, when nothing else was asked for."""
    return f"{gpus()[0]}, " if gpus() else "CPU, "

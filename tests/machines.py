"""Machines to plan for, whatever this one is; and of this one, what can be tested here and how it names places."""

from __future__ import annotations

import sys

import pytest

from pocketllava.llamacpp.devices import gpus
from pocketllava.models.limits import Limit
from pocketllava.models.machine import Device, Machine, rearranged_types

GIGA = 10**9
AVX2 = frozenset({"AVX2", "REPACK"})
ARM = frozenset({"NEON", "DOTPROD", "MATMUL_INT8", "REPACK"})

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces these limits")
no_driver = pytest.mark.skipif(bool(gpus()), reason="a driver takes memory of its own, which no plan has")


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

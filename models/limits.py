"""How much more memory this process may have: resource limits, cgroups, physical memory.

Knows the operating system's figures; no model. llama.cpp ends the process where an allocation fails, so what it will
allocate is compared with these figures first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from pocketllava.errors import BackendError

GIGA, MEGA = 10**9, 10**6
UNLIMITED = 1 << 60  # bytes; cgroup v1 says 2^63 rounded down to pages
# Beside the plan, measured with RLIMIT_AS (180 MiB end the process now and then, 220 do not): malloc's arenas,
# libraries, threads' stacks. All of it is address space, little of it is used.
OVERHEAD_BYTES, THREAD_BYTES = 210 << 20, 12 << 20
# What numpy and llama.cpp's libraries take before any model, beside a thread's share: with less of addresses or of
# data, loading them fails in as many ways as there are libraries, and OpenBLAS ends the process.
LIBRARIES_BYTES, LIBRARIES_DATA_BYTES = 140 << 20, 76 << 20
CGROUP, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limit:
    """One limit: its name, the bytes that are left of it, and whether mapped files and reserved addresses count.

    is_set: somebody set it; the machine's own memory is no such limit.
    """

    name: str
    left: int
    counts_mapped: bool = False
    counts_reserved: bool = False
    is_set: bool = True


def limits() -> Iterator[Limit]:
    """Every limit on this process's memory that the platform tells."""
    swap = psutil.swap_memory()
    yield Limit("this machine's memory", psutil.virtual_memory().total + swap.total, is_set=False)
    yield from resource_limits()
    for name, left in cgroup_limits():
        yield Limit(name, left + swap.free)


def resource_limits() -> Iterator[Limit]:
    """RLIMIT_AS and RLIMIT_DATA, as `ulimit -v` and `ulimit -d` set them. Only Linux enforces both."""
    if sys.platform != "linux":
        return
    import resource

    used = psutil.Process().memory_info()
    for name, kind, n_bytes, mapped in (
        ("RLIMIT_AS, ulimit -v", resource.RLIMIT_AS, used.vms, True),
        ("RLIMIT_DATA, ulimit -d", resource.RLIMIT_DATA, used.data, False),
    ):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield Limit(name, soft - n_bytes, counts_mapped=mapped, counts_reserved=True)


def is_limited() -> bool:
    """Whether a resource limit is set on this process's memory."""
    return any(True for _ in resource_limits())


def check_libraries() -> None:
    """Raises BackendError where a resource limit does not even leave what the libraries take; before they load."""
    if "llama_cpp" in sys.modules:  # they are there
        return
    threads = len(psutil.Process().cpu_affinity()) * THREAD_BYTES if sys.platform == "linux" else 0
    for limit in resource_limits():
        needed = threads + (LIBRARIES_BYTES if limit.counts_mapped else LIBRARIES_DATA_BYTES)
        if limit.left < needed:
            raise BackendError(
                f"memory: {limit.name} leaves {max(0, limit.left) / MEGA:.0f} MB, expected at least"
                f" {needed / MEGA:.0f} MB for the libraries alone; raise the limit"
            )


def cgroup_limits(listed: Path = CGROUP, mount: Path = MOUNT) -> Iterator[tuple[str, int]]:
    """(name, bytes left) of the process's cgroups and those above, versions 1 and 2.

    Cached files count as left: the kernel drops them first.
    """
    for line in _text(listed).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "memory":
            yield from _cgroup(
                mount / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
            )
        elif not controllers:
            yield from _cgroup(mount, path, "memory.max", "memory.current", "")


def _cgroup(mount: Path, path: str, limit: str, usage: str, prefix: str) -> Iterator[tuple[str, int]]:
    folder = mount / path.lstrip("/")
    for place in (folder, *folder.parents):
        most, used = _number(place / limit), _number(place / usage)
        if most is not None and used is not None and most < UNLIMITED:
            stat = dict(row.split(" ", 1) for row in _text(place / "memory.stat").splitlines() if " " in row)
            cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
            yield f"{limit} of {place}", most - used + cached
        if place == mount:
            return


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def check_room(path: Path, used: int, mapped: int = 0, *, threads: int = 0) -> None:
    """Raises BackendError where loading `path` cannot succeed.

    used: bytes that will be written, mapped: those of files that are mapped, which the kernel may drop again.
    threads: that will be started; 0 where llama.cpp runs already.
    """
    reserved = OVERHEAD_BYTES + threads * THREAD_BYTES if threads else 0
    for limit in limits():
        needed = used + limit.counts_mapped * mapped + limit.counts_reserved * reserved
        if needed > limit.left:
            raise BackendError(
                f"{path}: needs about {needed / GIGA:.2f} GB of memory, expected at most the"
                f" {max(0, limit.left) / GIGA:.2f} GB that {limit.name} leaves; a smaller n_ctx (--ctx), kv_type"
                " q8_0 (--kv-type) or a smaller quant (--quant) takes less"
            )

"""What a process did, as the system counts it, for tests and campaigns. Knows no program."""

from __future__ import annotations

import psutil


def cpu_s(process: psutil.Process) -> float:
    """Seconds that it has worked."""
    return sum(process.cpu_times()[:2])

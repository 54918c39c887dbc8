"""How much an engine may still work for a call that was ended. Knows what a step is on a CPU and on a device."""

from __future__ import annotations

from collections.abc import Callable

import psutil
from processes import cpu_s

from pocketllava.llamacpp.devices import gpus

CPU_S = 0.25  # of its own work, which other programs on its core do not change
SPREAD = 1.5  # room for a device's step, which is measured once; chosen after one run that took longer, not measured


def work_left_s(engine: psutil.Process, ask: Callable[[], object]) -> float:
    """Seconds of the engine's work, at most. ask: a call with the longest prompt and an answer of one token.

    A CPU looks before each node of a graph whether to go on. A device ends a graph that it has begun: up to a picture
    or a whole prompt, which takes a software GPU seconds.
    """
    if not gpus():
        return CPU_S
    before = cpu_s(engine)
    ask()
    return max(CPU_S, SPREAD * (cpu_s(engine) - before))

"""What `pocketllava doctor` asks children: what llama.cpp's library says of itself, and the demo's answers.

A library that was built for another CPU ends its process, so nothing of this runs in the command's own. Knows the
demo and its recorded answers; the table is health.py's.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from importlib.resources import files
from typing import Any

LIBRARY, ANSWERS = ("pocketllava.measure.self_test:" + name for name in ("library", "answers"))


def library() -> dict[str, Any]:
    """How llama.cpp was built, what it uses of the CPU, and the machine as it sees it."""
    import llama_cpp

    from pocketllava.llamacpp.devices import cpu_features, machine

    here = machine()
    built = llama_cpp.llama_print_system_info().decode("utf-8", "replace").strip(" |")
    devices = [asdict(device) for device in here.devices]
    limits = [[limit.name, limit.left] for limit in here.limits if limit.is_set]
    return {
        "built": built,
        "features": sorted(cpu_features()),
        "cpu": here.cpu,
        "free_bytes": here.free,
        "devices": devices,
        "limits": limits,
    }


def answers() -> dict[str, Any]:
    """The demo's answers about its own picture, and what gave them. Raises PocketLlavaError."""
    from pocketllava import Llava
    from pocketllava.models.demo.picture import QUESTIONS, drawn_picture

    start = time.perf_counter()
    with Llava.load("demo") as llava:
        texts = {q: llava.ask(drawn_picture(), q, max_tokens=64).text for q in QUESTIONS}
        return {"answers": texts, "devices": list(llava.devices), "seconds": time.perf_counter() - start}


def recorded() -> dict[str, str]:
    """The answers that the demo gave in Q4_K_M on the machine that this version was made on."""
    text = (files("pocketllava.models.demo") / "answers.json").read_text("utf-8")
    return dict(json.loads(text))

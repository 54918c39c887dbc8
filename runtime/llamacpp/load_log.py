"""What llama.cpp logs while it loads, read: the device of each layer and of the vision tower, and what had no room.

Knows lines of its log, as version 0.3.36 writes them; loads nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

CPU = "CPU"
LAYER = re.compile(r"load_tensors: layer +(\d+) assigned to device ([^,]+),")
OFFLOADED = re.compile(r"load_tensors: offloaded (\d+)/(\d+) layers")
VISION = re.compile(r"CLIP using (.+?) backend")
# What is said when memory is missing (llama-model.cpp, llama-kv-cache.cpp, llama-context.cpp), and of which part.
MISSING = (
    (re.compile(r"unable to allocate .* buffer"), "weights"),
    (re.compile(r"failed to allocate buffer for kv cache"), "KV cache"),
    (re.compile(r"failed to allocate (compute|output|graph)"), "buffers"),
)


def text_device(lines: Iterable[str], names: Sequence[str], threads: int) -> str:
    """ "CUDA0 (a card), 33/33 layers", "CUDA0 (a card) 17 + CUDA1 (another) 16, 33/33 layers", "CPU, 8 threads"

    names: of the devices, with their descriptions.
    """
    layers: dict[str, str] = {}
    offloaded = ""
    for line in lines:
        if match := LAYER.search(line):
            layers[match[1]] = match[2]
        elif (match := OFFLOADED.search(line)) and int(match[1]):
            offloaded = f"{match[1]}/{match[2]} layers"
    counts = Counter(device for device in layers.values() if device != CPU)
    if not names or not (counts or (offloaded and not layers)):
        return f"CPU, {threads} thread{'s' if threads != 1 else ''}"
    total = f"{counts.total()}/{len(layers)} layers" if layers else offloaded
    if len(counts) < 2:
        return f"{full_name(next(iter(counts), names[0]), names)}, {total}"
    return f"{' + '.join(f'{full_name(device, names)} {n}' for device, n in counts.items())}, {total}"


def vision_device(lines: Iterable[str], names: Sequence[str]) -> str:
    """ "CUDA0 (NVIDIA RTX 4070)" or "CPU"."""
    found = (match[1] for line in lines if (match := VISION.search(line)))
    return full_name(next(found, CPU), names)


def missing_part(lines: Iterable[str]) -> str | None:
    """The part of a text model that found no memory; None where llama.cpp says nothing like that."""
    found = (part for line in lines for pattern, part in MISSING if pattern.search(line))
    return next(found, None)


def short_name(name: str) -> str:
    """ "CUDA0 (NVIDIA RTX 4070)" -> "CUDA0", llama.cpp's own name."""
    return name.partition(" (")[0]


def full_name(device: str, names: Sequence[str]) -> str:
    """llama.cpp's name with the device's description, where there is one."""
    return next((name for name in names if short_name(name) == device.strip()), device.strip())

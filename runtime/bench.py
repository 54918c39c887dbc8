"""Where the time of answers goes on this machine: measured on a loaded model, as medians of several runs.

Knows Llava and its timings; prints nothing. Every run shows pictures that no cache has seen.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pocketllava.llava import Llava
from pocketllava.types import Options, Timings

FIRST, SECOND = "Describe the image in detail.", "What is the main colour of the image?"
ENOUGH_TOKENS = 8  # to speak of decoding speed
STAMP = 48  # pixels; large enough to survive resizing


@dataclass(frozen=True)
class Figure:
    """One measured quantity, a value a run."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    def to_json(self) -> dict[str, Any]:
        """Unit, median, smallest, largest, and every value."""
        return {
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
        }


def bench(
    llava: Llava, picture: Image.Image, *, runs: int, tokens: int, progress: Callable[[], object]
) -> list[Figure]:
    """Ask about new versions of a picture, `runs` times over; progress is called after each run."""
    measured: dict[tuple[str, str], list[float]] = {}
    for _ in range(runs):
        for key, value in _one_run(llava, picture, tokens).items():
            measured.setdefault(key, []).append(value)
        progress()
    measured["peak memory", "MB"] = [peak_bytes() / 1e6]
    return [Figure(name, unit, tuple(values)) for (name, unit), values in measured.items()]


def unseen(picture: Image.Image) -> Image.Image:
    """A version of a picture that was never shown: a small square of noise in its middle."""
    version = picture.convert("RGB")
    side = min(STAMP, *version.size)
    noise = Image.frombytes("RGB", (8, 8), os.urandom(8 * 8 * 3)).resize(
        (side, side), Image.Resampling.NEAREST
    )
    version.paste(noise, ((version.width - side) // 2, (version.height - side) // 2))
    return version


def peak_bytes() -> int:
    """The most memory that this process ever had resident."""
    import psutil

    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def machine(llava: Llava) -> dict[str, Any]:
    """What was measured on, and with what."""
    import llama_cpp
    import psutil

    manifest = llava.bundle.manifest
    return {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "pocketllava": importlib.metadata.version("pocketllava"),
        "llama-cpp-python": llama_cpp.__version__,
        "model": manifest["source"]["id"],
        "types": f"{manifest['types']['model']} + {manifest['types']['mmproj']}",
        "n_ctx": llava.n_ctx,
    }


def _one_run(llava: Llava, picture: Image.Image, tokens: int) -> dict[tuple[str, str], float]:
    options = Options(max_tokens=tokens)
    one, other = unseen(picture), unseen(picture)
    cold = llava.ask(one, FIRST, options=options).timings
    second = llava.ask(one, SECOND, options=options).timings
    start = time.perf_counter()
    llava.prepare(other).wait()
    prepared_s = time.perf_counter() - start
    prepared = llava.ask(other, FIRST, options=options).timings
    back = llava.ask(one, FIRST, options=options).timings
    found = {
        ("image preparation", "s"): cold.prepare_s,
        ("image encoding", "s"): cold.encode_s,
        ("prompt evaluation", "tokens/s"): cold.prompt_tokens / cold.prompt_s,
        ("first token, new image", "s"): cold.first_token_s,
        ("first token, second question", "s"): second.first_token_s,
        ("preparing an image", "s"): prepared_s,
        ("first token, prepared image", "s"): prepared.first_token_s,
        ("first token, back to an earlier image", "s"): back.first_token_s,
    }
    if speed := _decoding((cold, second, prepared, back)):
        found["decoding", "tokens/s"] = speed
    return found


def _decoding(all_timings: tuple[Timings, ...]) -> float | None:
    """Tokens a second of the longest answer, or None if all ended at once."""
    longest = max(all_timings, key=lambda timings: timings.answer_tokens)
    return longest.tokens_per_s if longest.answer_tokens >= ENOUGH_TOKENS else None


def _cpu_name() -> str:
    if sys.platform == "linux":
        from pathlib import Path

        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

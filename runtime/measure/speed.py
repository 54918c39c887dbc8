"""Times the stages of an answer on this machine with a loaded model, over several runs.

Knows Llava, its timings and the machine; prints nothing. Every run shows new pictures, which no cache in memory or on
disk can hold.
"""

from __future__ import annotations

import io
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from pocketllava.llava import Llava
from pocketllava.types import Answer, Message, Options

FIRST, SECOND = "Describe the image in detail.", "What is the main color of the image?"
MORE = ("Describe the image.", "What is in the background?", "How many objects are there?")
STEPS_PER_RUN = 4  # calls of progress a run
ENOUGH_TOKENS = 8  # fewer give no decoding speed
SQUARES = 8  # noise of SQUARES x SQUARES colors: 192 random bytes, which never repeat
NOISE = 8  # it covers 1/NOISE of the shorter side, which survives resizing to 336 pixels
JPEG_QUALITY = 95
CPUINFO, STATUS = Path("/proc/cpuinfo"), Path("/proc/self/status")


@dataclass(frozen=True)
class Figure:
    """One quantity with a value for each run; none where a run could not measure it."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float | None:
        """The middle value."""
        return statistics.median(self.values) if self.values else None

    def to_json(self) -> dict[str, Any]:
        """Unit, median, smallest, largest (null without values), and every value."""
        return {
            "unit": self.unit,
            "median": self.median,
            "min": min(self.values, default=None),
            "max": max(self.values, default=None),
            "values": list(self.values),
        }


def bench(
    llava: Llava, picture: Image.Image, *, runs: int, tokens: int, progress: Callable[[], object]
) -> list[Figure]:
    """Ask about new versions of a picture, `runs` times over, after one question without a picture to warm up.

    Answers from which decoding is measured have at most `tokens` tokens. progress is called STEPS_PER_RUN
    times a run.
    """
    llava.chat([Message("user", FIRST)], options=Options(max_tokens=1))
    measured: dict[tuple[str, str], list[float]] = {("load", "s"): [llava.load_s]}
    for _ in range(runs):
        for key, values in _one_run(llava, picture, tokens, progress).items():
            measured.setdefault(key, []).extend(values)
    measured["peak memory", "MB"] = [peak_bytes() / 1e6]
    return [Figure(name, unit, tuple(values)) for (name, unit), values in measured.items()]


def _one_run(
    llava: Llava, picture: Image.Image, tokens: int, progress: Callable[[], object]
) -> dict[tuple[str, str], list[float]]:
    """Picture A is asked about twice, B is prepared and asked about, then A again."""
    a, b = jpeg(unseen(picture)), jpeg(unseen(picture))
    long, short = Options(max_tokens=tokens), Options(max_tokens=1)
    answer = llava.ask(a, FIRST, options=long)
    progress()
    second = llava.ask(a, SECOND, options=short).timings
    progress()
    start = time.perf_counter()
    llava.prefill(b).wait()
    preparing_s = time.perf_counter() - start
    prepared = llava.ask(b, FIRST, options=short).timings
    progress()
    back = llava.ask(a, MORE[1], options=short).timings
    speed = decoding_speed(answers(lambda question: llava.ask(a, question, options=long), answer))
    progress()
    cold = answer.timings
    evaluated = cold.prompt_tokens - cold.cached_tokens
    return {
        ("image preparation", "s"): [cold.preprocess_s],
        ("image encoding", "s"): [cold.encode_s],
        ("prompt", "tokens"): [cold.prompt_tokens],
        ("of them the image", "tokens"): [cold.image_tokens],
        ("prompt evaluation", "tokens/s"): [evaluated / cold.prompt_s] if cold.prompt_s else [],
        ("first token, new image", "s"): [cold.first_token_s],
        ("first token, second question", "s"): [second.first_token_s],
        ("kept for the second question", "tokens"): [second.cached_tokens],
        ("preparing an image", "s"): [preparing_s],
        ("first token, prepared image", "s"): [prepared.first_token_s],
        ("kept for the prepared image", "tokens"): [prepared.cached_tokens],
        ("first token, back to an earlier image", "s"): [back.first_token_s],
        ("kept for the earlier image", "tokens"): [back.cached_tokens],
        ("decoding", "tokens/s"): [] if speed is None else [speed],
    }


def answers(ask: Callable[[str], Answer], first: Answer, enough: int = ENOUGH_TOKENS) -> list[Answer]:
    """The first answer and, while they have fewer than `enough` tokens to time, those to a few more questions."""
    collected = [first]
    for question in MORE:
        if sum(map(decoded_tokens, collected)) >= enough:
            break
        collected.append(ask(question))
    return collected


def decoding_speed(answers: Iterable[Answer]) -> float | None:
    """Tokens a second after the first ones; None for answers that ended too early."""
    answers = list(answers)
    n, seconds = sum(map(decoded_tokens, answers)), sum(answer.timings.decode_s for answer in answers)
    return n / seconds if n >= ENOUGH_TOKENS and seconds else None


def decoded_tokens(answer: Answer) -> int:
    """Tokens sampled in decode_s: those after the first, and the one that ended the answer."""
    return len(answer.token_ids) - (answer.finish_reason != "stop")


def unseen(picture: Image.Image) -> Image.Image:
    """A new version of a picture: a square of noise in its middle, which no crop cuts off."""
    side = max(1, min(picture.size) // NOISE)
    noise = Image.frombytes("RGB", (SQUARES, SQUARES), os.urandom(SQUARES * SQUARES * 3))
    changed = picture.convert("RGB")
    place = ((changed.width - side) // 2, (changed.height - side) // 2)
    changed.paste(noise.resize((side, side), Image.Resampling.NEAREST), place)
    return changed


def jpeg(picture: Image.Image) -> bytes:
    """A picture as a camera's file, so that decoding counts."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def peak_bytes(status: Path = STATUS) -> int:
    """The peak of resident memory of this process, or on Linux of the one with this /proc/PID/status.

    Linux's ru_maxrss is not used: a new process starts with its parent's.
    """
    if status.exists():
        line = next(row for row in status.read_text("ascii").splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def machine() -> dict[str, Any]:
    """The machine and the versions of what runs on it."""
    import psutil

    from pocketllava.llamacpp.devices import cores

    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "pocketllava": version("pocketllava"),
        "llama-cpp-python": version("llama-cpp-python"),
    }


def loaded(llava: Llava) -> dict[str, Any]:
    """The loaded model and its devices."""
    manifest = llava.bundle.manifest
    text, vision = llava.devices
    return {
        "model": manifest.source.id,
        "types": f"{manifest.types.model} + {manifest.types.mmproj}",
        "n_ctx": llava.n_ctx,
        "text": text,
        "vision": vision,
    }


def _cpu_name() -> str:
    """The processor's own name where it has one: "AMD EPYC 9B14"."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if sys.platform == "win32":
        import winreg

        with winreg.OpenKey(
            winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"
        ) as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    return platform.processor() or platform.machine()

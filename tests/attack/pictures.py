"""Every hostile picture and a few hostile arrays, each in a process of its own: how long it takes and how much memory.

    PYTHONPATH=tests python tests/attack/pictures.py FOLDER [WORD]...

Prints a line for each (all that have a WORD in their name) and fails where one takes more than 2 s or 400 MB. Linux.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import hostile_pictures as hostile
import numpy as np
from attack.counts import Counts

from pocketllava import ImageError
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.vision.image_processor import ImageProcessor

MAX_S, MAX_MB, HANG_S = 2.0, 400.0, 60.0
ARRAYS = {
    "an array of 81 megapixels": lambda: np.zeros((9000, 9000, 3), np.uint8),
    "an array of a tebibyte": lambda: np.broadcast_to(np.uint8(1), (1 << 20, 1 << 20)),
    "an array of many channels": lambda: np.broadcast_to(np.uint8(1), (9, 9, 1 << 40)),
    "an array of one axis": lambda: np.broadcast_to(np.uint8(1), (1 << 40,)),
    "floats of 49 megapixels": lambda: np.broadcast_to(np.float64(0.5), (7000, 7000, 3)),
    "16 bits of 49 megapixels": lambda: np.broadcast_to(np.uint16(9), (7000, 7000, 4)),
    "objects": lambda: np.broadcast_to(np.array(None), (7000, 7000)),
}


QUICK_ARRAYS = [name for name in ARRAYS if "of 49" not in name]


def peak_mb() -> float:
    """Of this process, since it was last reset."""
    line = next(
        row
        for row in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if row.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1000


def warm(processor: ImageProcessor) -> None:
    """Import what decoding imports, and forget the peak."""
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"):
        processor.process(hostile.photo_bytes(kind))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(name: str, path: Path, pad: bool, answer: Connection) -> None:
    """In a process of its own."""
    processor = ImageProcessor(Preprocessing(pad_to_square=pad), grid=24)
    warm(processor)
    source = ARRAYS[name]() if name in ARRAYS else path
    before, start = peak_mb(), time.process_time()
    try:
        processor.process(source)
        outcome = "accepted"
    except ImageError as error:
        outcome = f"refused: {str(error).replace(str(path), name)}"
    except BaseException:
        outcome = f"traceback: {traceback.format_exc()}"
    answer.send((outcome, time.process_time() - start, peak_mb() - before))


def build(name: str, path: Path) -> None:
    """Also in a process of its own, because encoders take much more than decoders."""
    path.write_bytes(hostile.HOSTILE[name]())


def case(name: str, path: Path, pad: bool) -> tuple[str, float, float]:
    """(outcome, CPU seconds, megabytes) of one picture."""
    context = multiprocessing.get_context("spawn")
    if name in hostile.HOSTILE:
        builder = context.Process(target=build, args=(name, path))
        builder.start()
        builder.join()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=measure, args=(name, path, pad, sender))
    child.start()
    sender.close()
    try:
        outcome: tuple[str, float, float] = (
            receiver.recv() if receiver.poll(HANG_S) else ("hang", HANG_S, 0.0)
        )
    except EOFError:
        outcome = ("crash", 0.0, 0.0)
    child.kill()
    child.join()
    return outcome


def run(folder: Path, words: list[str]) -> Counts:
    """All pictures, or those with one of the words in their name."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = Counts()
    for name in [n for n in (*hostile.HOSTILE, *ARRAYS) if not words or any(w in n for w in words)]:
        for pad in (False, True):
            outcome, took_s, took_mb = case(name, folder / "picture", pad)
            counts.cases += 1
            kind = outcome.partition(":")[0]
            field = {"traceback": "tracebacks", "hang": "hangs", "crash": "crashes"}.get(kind, kind)
            if field in ("refused", "accepted") and (took_s > MAX_S or took_mb > MAX_MB):
                field = "wrong"
            setattr(counts, field, getattr(counts, field) + 1)
            line = f"{name}{', padded' * pad}: {took_s:.2f} s, {took_mb:.0f} MB, {outcome}"
            print(line, flush=True)
            if field not in ("refused", "accepted"):
                counts.failures.append(line)
    return counts


if __name__ == "__main__":
    total = run(Path(sys.argv[1]), sys.argv[2:])
    print(total)
    sys.exit(1 if total.failures else 0)

"""What a phone's photo costs the first question about it, and the next ones: reading, decoding and resizing.

    python benchmarks/photos.py [BUNDLE] [-n RUNS]

Prints a table of medians in milliseconds. The photo is a JPEG of 4032 x 3024 pixels, tests/photo.jpg made as large
as a phone's, with a sensor's noise.
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pocketllava import Llava, Message, Options
from pocketllava.measure.speed import machine
from pocketllava.types import ImageSource

PHOTO = Path(__file__).parent.parent / "tests" / "photo.jpg"
SIZE = (4032, 3024)
ONE = Options(max_tokens=1)


def phone_photo(seed: int) -> bytes:
    """A 12-megapixel JPEG, about 5 MB."""
    large = Image.open(PHOTO).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(seed).normal(0, 4, (SIZE[1], SIZE[0], 1))
    noisy = np.clip(np.asarray(large, np.float32) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def sources(folder: Path, n: int) -> dict[str, list[ImageSource]]:
    """The same n photos as paths, bytes and data URIs."""
    photos = [phone_photo(seed) for seed in range(n)]
    paths = [folder / f"{seed}.jpg" for seed in range(n)]
    for path, photo in zip(paths, photos, strict=True):
        path.write_bytes(photo)
    time.sleep(2.5)  # a file that was just written is read again, as long as its clock could hide a change
    uris = ["data:image/jpeg;base64," + base64.b64encode(photo).decode() for photo in photos]
    return {"path": list(paths), "bytes": list(photos), "data URI": list(uris)}


def measure(bundle: str, images: list[ImageSource], runs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of image preparation: of first questions, and of the ones that follow."""
    first, following = [], []
    for _ in range(runs):
        with Llava.load(bundle) as llava:
            turns = [Message("user", "Describe the image.", tuple(images))]
            for question in ("What is in it?", "Where?", "Why?"):
                answer = llava.chat(turns, options=ONE)
                (following if len(turns) > 1 else first).append(answer.timings.preprocess_s * 1000)
                turns += [Message("assistant", answer.text), Message("user", question)]
    return first, following


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", nargs="?", default="demo")
    parser.add_argument("-n", "--runs", type=int, default=5)
    args = parser.parse_args()
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, llama-cpp-python {about['llama-cpp-python']}\n")
    print("| photos | given as | first question, ms | next questions, ms |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 3):
            for kind, images in sources(Path(folder), n).items():
                first, following = measure(args.bundle, images, args.runs)
                print(
                    f"| {n} | {kind} | {statistics.median(first):.0f} | {statistics.median(following):.1f} |"
                )


if __name__ == "__main__":
    main()

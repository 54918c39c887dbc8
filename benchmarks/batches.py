"""How an image's positions are best evaluated: python benchmarks/batches.py BUNDLE [-n 5]

Evaluates the positions of one image with batches of 512 (for 576 positions: 512 and 64), of the image's size and of
1024, in turn, each in a context of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from llama_cpp import Llama

from pocketllava.backend import capture_log, cores
from pocketllava.batch import decode_features
from pocketllava.models import Bundle


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("-n", "--runs", type=int, default=5)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    n = int(bundle.manifest["image"]["n_patches"])
    times: dict[int, list[float]] = {size: [] for size in sorted({512, n, 1024})}
    capture_log()
    rng = np.random.default_rng(0)
    for size in times:
        llama = Llama(
            str(bundle.model), n_ctx=2048, n_batch=size, n_ubatch=size, n_threads=cores(), n_threads_batch=cores(),
            use_mmap=False, verbose=False,
        )  # fmt: skip
        features = rng.standard_normal((n, llama.n_embd()), dtype=np.float32)
        for run in range(arguments.runs + 1):
            llama._ctx.kv_cache_clear()
            start = time.perf_counter()
            decode_features(llama.ctx, features, 0, size)
            llama.n_tokens = n
            llama.eval([1])  # waits for the result
            if run:  # the first one warms up
                times[size].append(time.perf_counter() - start)
        llama.close()
    print(f"{n} positions and a token, median of {arguments.runs}\n\n| n_batch = n_ubatch | s |\n|---|---|")
    for size, measured in times.items():
        print(f"| {size} | {statistics.median(measured):.3f} |")


if __name__ == "__main__":
    main()

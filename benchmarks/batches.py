"""How an image's positions are best evaluated: all at once, or in pieces that attend to what came before them.

    python benchmarks/batches.py BUNDLE [-n 5] [--sizes 512,576,1024] [--flash-attn]

One loaded model, a context for each size of n_ubatch; the sizes take turns, the first turn only warms
up. The features are random: how long they take does not depend on them. Run it alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import Llama, llama_cpp

from pocketllava.llamacpp.batch import decode_features
from pocketllava.llamacpp.devices import cores
from pocketllava.llamacpp.log import capture_log
from pocketllava.names import open_bundle

SIZES = "512,576,1024"  # for 576 positions: 512 and 64, one batch that just fits, one with room
CONTEXT = 1024


@contextmanager
def context_of(llama: Llama, size: int) -> Iterator[Any]:
    """Another context of a loaded model, whose batches are computed in pieces of this size."""
    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, CONTEXT, size
    context = llama_cpp.llama_init_from_model(llama.model, params)
    if not context:
        raise SystemExit(f"n_batch {size}: llama.cpp could not make a context")
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)


def evaluated_s(context: Any, features: npt.NDArray[np.float32]) -> float:
    """Seconds for all features, in an empty cache."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    start = time.perf_counter()
    decode_features(context, features, 0, CONTEXT)
    llama_cpp.llama_synchronize(context)
    return time.perf_counter() - start


def measured(
    llama: Llama, features: npt.NDArray[np.float32], sizes: list[int], runs: int
) -> dict[int, list[float]]:
    """Size -> seconds of every run. One context at a time exists, so that all have the same memory."""
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(runs):
        for size in sizes[turn % len(sizes) :] + sizes[: turn % len(sizes)]:
            with context_of(llama, size) as context:
                evaluated_s(context, features)  # touches its memory for the first time
                times[size].append(evaluated_s(context, features))
    return times


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("-n", "--runs", type=int, default=5)
    parser.add_argument("--sizes", default=SIZES, help="n_ubatch, several with commas")
    parser.add_argument("--flash-attn", action="store_true", help="pocketllava leaves it out on CPUs")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    bundle = open_bundle(arguments.bundle)
    capture_log()
    llama = Llama(
        str(bundle.model), n_ctx=256, n_batch=32, n_threads=cores(), n_threads_batch=cores(), n_gpu_layers=-1,
        use_mmap=False, verbose=False, flash_attn=arguments.flash_attn,
    )  # fmt: skip
    n = bundle.image_tokens
    features = np.random.default_rng(0).standard_normal((n, llama.n_embd()), dtype=np.float32)
    times = measured(llama, features, sizes, arguments.runs)
    llama.close()
    medians = {size: statistics.median(values) for size, values in times.items()}
    print(f"{n} image positions, {cores()} threads, median of {arguments.runs}\n")
    print("| n_ubatch | batches | s | min | max | of 512's |\n|---|---|---|---|---|---|")
    for size, values in times.items():
        ratio = medians[size] / medians[sizes[0]]
        print(
            f"| {size} | {-(-n // size)} | {medians[size]:.3f} | {min(values):.3f} | {max(values):.3f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()

"""Captions for a folder by Ray Data: two actors, bytes in, parquet out; run again, it goes on where it stopped.

python examples/cluster/ray_captions.py PICTURES OUTPUT [MODEL]       pip install "pocketllava[ray]"
"""

import sys
from pathlib import Path

import ray  # pyright: ignore[reportMissingImports]  (an extra)

from pocketllava.integrations.ray import Captioner, done_paths

ACTORS = 2


def main(pictures: str, output: str, model: str = "demo") -> None:
    """Caption what the output does not hold yet."""
    done = done_paths(Path(output))
    paths = [str(path) for path in sorted(Path(pictures).absolute().rglob("*.*")) if str(path) not in done]
    print(f"{len(done)} done, {len(paths)} to do", flush=True)
    if not paths:
        return
    ray.init(num_cpus=ACTORS + 2, include_dashboard=False)  # the actors, and what reads and writes
    ray.data.read_binary_files(paths, include_paths=True).map_batches(
        Captioner,
        fn_constructor_kwargs={"model": model, "question": "Describe the image.", "actors": ACTORS},
        compute=ray.data.ActorPoolStrategy(size=ACTORS),
        batch_size=8,
        num_cpus=1,
    ).write_parquet(output, mode="append")


if __name__ == "__main__":
    main(*sys.argv[1:])

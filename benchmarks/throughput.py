"""Images an hour: ask() in a loop, ask_many() and llama-server, one caption of each of many new pictures.

    LLAMA_SERVER=build/bin/llama-server python benchmarks/throughput.py BUNDLE [--image FILE] [-n 3] [--pictures 12]
        [--tokens 60] [--image-tokens 128] [--ctx 1024] [--only SIDE ...]
    python benchmarks/throughput.py demo --agreement 300

Every side loads the model anew and answers a question about no picture first, which does not count; then the clock
runs from the first of the pictures to the end of the last answer. The sides take turns, no side sees a picture twice,
and medians are printed. The end of an answer is ignored, so that every caption has as many tokens, with random weights
too. llama-server has no way to show fewer image tokens. --agreement compares ask_many's greedy answers about scenes of
the demo's world with ask's, token by token, and times nothing. Run it alone.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from arguments import about, arguments
from PIL import Image
from sides import SERVER, llama_server, server_times

from pocketllava import Answer, Llava, Options, PocketLlavaError
from pocketllava.measure.speed import FIRST, jpeg, unseen
from pocketllava.models import Bundle
from pocketllava.models.demo import scenes
from pocketllava.names import open_bundle

SLOTS = 4
BATCHES = (2, 4, 8, 16)  # of --agreement
SERVERS = {"llama-server": 1, f"llama-server, {SLOTS} slots": SLOTS}
# None: ask() in a loop
OURS: dict[str, int | Literal["auto"] | None] = {"ask": None, "batch 1": 1, "batch auto": "auto"}


@dataclass(frozen=True)
class Asked:
    """What every side is to do."""

    bundle: Bundle
    n_ctx: int
    tokens: int


Measure = Callable[[Asked, list[bytes]], float]  # pictures -> seconds


def our_seconds(
    asked: Asked, pictures: list[bytes], batch: int | Literal["auto"] | None, image_tokens: int | None
) -> float:
    """Of pocketllava, as a program uses it."""
    options = Options(max_tokens=asked.tokens, image_tokens=image_tokens)
    with Llava.load(asked.bundle.folder, n_ctx=asked.n_ctx) as llava:
        endless(llava)
        llava.ask(None, FIRST, options=options)
        start = time.perf_counter()
        if batch is None:
            results: Iterable[Answer | PocketLlavaError] = (
                llava.ask(picture, FIRST, options=options) for picture in pictures
            )
        else:
            results = llava.ask_many(pictures, FIRST, batch=batch, options=options)
        lengths = [len(checked(result).token_ids) for result in results]
        seconds = time.perf_counter() - start
    return counted(lengths, asked, pictures, seconds)


def server_seconds(asked: Asked, pictures: list[bytes], slots: int) -> float:
    """Of llama-server with so many slots, each of them asked all the time."""
    with llama_server(asked.bundle, asked.n_ctx, slots) as (port, _), ThreadPoolExecutor(slots) as pool:
        server_times(port, None, [FIRST], asked.tokens)
        start = time.perf_counter()
        results = pool.map(lambda picture: server_times(port, picture, [FIRST], asked.tokens), pictures)
        lengths = [times.n_after + 1 for times in results]
        seconds = time.perf_counter() - start
    return counted(lengths, asked, pictures, seconds)


def endless(llava: Llava) -> None:
    """No token ends an answer any more."""
    with llava.session() as session:
        session.text.vocabulary.is_end = lambda _token: False  # type: ignore[method-assign, assignment]


def checked(result: Answer | PocketLlavaError) -> Answer:
    """An answer; what is none ends the benchmark."""
    if isinstance(result, PocketLlavaError):
        raise result
    return result


def counted(lengths: list[int], asked: Asked, pictures: list[bytes], seconds: float) -> float:
    """The seconds, if every caption is there and whole."""
    if lengths != [asked.tokens] * len(pictures):
        raise SystemExit(f"captions: found {lengths} tokens, expected {len(pictures)} of {asked.tokens}")
    return seconds


def ours(batch: int | Literal["auto"] | None, image_tokens: int | None) -> Measure:
    """A side of pocketllava."""
    return lambda asked, pictures: our_seconds(asked, pictures, batch, image_tokens)


def server(slots: int) -> Measure:
    """A side of llama-server."""
    return lambda asked, pictures: server_seconds(asked, pictures, slots)


def all_sides(bundle: Bundle, fewer: int) -> dict[str, Measure]:
    """Those that can run here: llama-server where LLAMA_SERVER names it, fewer image tokens if there are more."""
    found = {name: ours(batch, None) for name, batch in OURS.items()}
    if fewer < bundle.image_tokens:
        found |= {f"{name}, {fewer} image tokens": ours(batch, fewer) for name, batch in OURS.items()}
    if os.environ.get(SERVER):
        found |= {name: server(slots) for name, slots in SERVERS.items()}
    return found


def measured(
    sides: dict[str, Measure], asked: Asked, image: Image.Image, n: int, runs: int
) -> dict[str, list[float]]:
    """Images an hour of each side in each round."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for run in range(runs):
        for side in [*sides][run % len(sides) :] + [*sides][: run % len(sides)]:
            pictures = [jpeg(unseen(image)) for _ in range(n)]
            found[side].append(n * 3600 / sides[side](asked, pictures))
            print(json.dumps({"round": run + 1, side: found[side][-1]}), file=sys.stderr, flush=True)
    return found


def table(found: dict[str, list[float]]) -> None:
    """Medians, and how they compare."""
    medians = {side: statistics.median(values) for side, values in found.items()}
    best = max((medians[side] for side in SERVERS if side in medians), default=0.0)
    print(
        "| side | images an hour | least | most | to ask | to llama-server's best |\n|---|---|---|---|---|---|"
    )
    for side, median in medians.items():
        to_ask = f"{median / medians['ask']:.2f}" if "ask" in medians else ""
        to_best = f"{median / best:.2f}" if best else ""
        least, most = min(found[side]), max(found[side])
        print(f"| {side} | {median:.1f} | {least:.1f} | {most:.1f} | {to_ask} | {to_best} |")


def agreement(bundle: Bundle, n: int, tokens: int) -> None:
    """How often ask_many's tokens are ask's, over n scenes."""
    pictures = [scenes.scene(seed).draw() for seed in scenes.HELD_OUT_SEEDS[:n]]
    options = Options(max_tokens=tokens)
    print(f"| batch | scenes | tokens | equal tokens | equal answers |\n|---{'|---' * 4}|")
    with Llava.load(bundle.folder) as llava:
        alone = [llava.ask(picture, FIRST, options=options).token_ids for picture in pictures]
        for batch in BATCHES:
            results = llava.ask_many(pictures, FIRST, batch=batch, options=options)
            row(batch, alone, [checked(result).token_ids for result in results])


def row(batch: int, alone: list[tuple[int, ...]], together: list[tuple[int, ...]]) -> None:
    """One line of the table: tokens are compared place by place, and a missing one is a different one."""
    total = sum(max(len(a), len(b)) for a, b in zip(alone, together, strict=True))
    equal = sum(equal_tokens(a, b) for a, b in zip(alone, together, strict=True))
    whole = sum(a == b for a, b in zip(alone, together, strict=True))
    n = len(alone)
    print(f"| {batch} | {n} | {total} | {equal / total:.2%} | {whole / n:.2%} |", flush=True)


def equal_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Places with the same token."""
    return sum(x == y for x, y in zip(a, b, strict=False))


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    for name, default in (("pictures", 12), ("tokens", 60), ("image-tokens", 128), ("ctx", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--agreement", type=int, metavar="SCENES")
    parser.add_argument("--only", nargs="+", metavar="SIDE", help="sides of the table, by their names")
    a: Any = parser.parse_args()
    bundle = open_bundle(a.bundle)
    if a.agreement:
        agreement(bundle, a.agreement, a.tokens)
        return
    sides = all_sides(bundle, a.image_tokens)
    if unknown := set(a.only or ()) - set(sides):
        parser.error(f"--only: found {sorted(unknown)}, expected some of {list(sides)}")
    chosen = {name: side for name, side in sides.items() if name in (a.only or sides)}
    asked = Asked(bundle, a.ctx, a.tokens)
    found = measured(chosen, asked, Image.open(a.image), a.pictures, a.runs)
    print(about(pictures=a.pictures, tokens=a.tokens, n_ctx=a.ctx, rounds=a.runs) + "\n")
    table(found)


if __name__ == "__main__":
    main()

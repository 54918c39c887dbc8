"""A token of each of n answers in one batch: milliseconds a step, and of each answer's token.

    python benchmarks/decoding_together.py BUNDLE [-n 10] [--answers 1,2,4,8,12,16] [--positions 200]

One context with as many sequences as the most answers; all hold the same prompt of text, and the numbers of answers
take turns. How many are decoded together by `--batch auto` is chosen by this (engine/many.py). Run it alone.
"""

from __future__ import annotations

import statistics
import time

from arguments import about, arguments

from pocketllava.engine.loading import load_bundle
from pocketllava.llamacpp.sequences import Sequences
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.names import open_bundle
from pocketllava.types import LoadOptions

ANSWERS = "1,2,4,8,12,15,16,20,32"
FIRST_ID = 3  # after the special ones


def measured(text: TextModel, numbers: list[int], positions: int, runs: int) -> dict[int, list[float]]:
    """Number of answers -> seconds of every step. The first round only warms up."""
    times: dict[int, list[float]] = {n: [] for n in numbers}
    prompt = [FIRST_ID + i * 7919 % (text.n_vocab - FIRST_ID) for i in range(positions)]
    with Sequences(text, max(numbers), positions + 1) as sequences:
        for sequence in range(max(numbers)):
            sequences.prefill(sequence, 0, [prompt])
        for turn in range(runs + 1):
            for n in numbers:
                tokens = [(sequence, positions, FIRST_ID + turn + sequence) for sequence in range(n)]
                start = time.perf_counter()
                sequences.step(tokens)
                if turn:
                    times[n].append(time.perf_counter() - start)
                for sequence in range(n):
                    sequences.truncate(sequence, positions)
    return times


def main() -> None:
    """Measure and print a table."""
    parser = arguments(__doc__)
    parser.add_argument("--answers", default=ANSWERS, help="how many at once, several with commas")
    parser.add_argument("--positions", type=int, default=200, help="that each sequence holds")
    asked = parser.parse_args()
    bundle = open_bundle(asked.bundle)
    numbers = [int(n) for n in asked.answers.split(",")]
    session = load_bundle(bundle, LoadOptions()).session
    times = measured(session.text, numbers, asked.positions, asked.runs)
    session.close()
    print(about(bundle=bundle.folder.name, positions=asked.positions, rounds=asked.runs) + "\n")
    print("| answers | ms a step | ms a token | of one alone |\n|---|---|---|---|")
    each = {n: statistics.median(seconds) * 1000 / n for n, seconds in times.items()}
    for n in numbers:
        print(f"| {n} | {each[n] * n:.1f} | {each[n]:.2f} | {each[n] / each[numbers[0]]:.2f} |")


if __name__ == "__main__":
    main()

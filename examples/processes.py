"""Ask from several processes, each with a model of its own.

python examples/processes.py [MODEL IMAGE]

Start processes with "spawn": a model that is loaded does not survive fork(). Each process takes the model's
memory again (see `pocketllava inspect`), so this pays only for small models on machines with many cores.
"""

import multiprocessing
import os
import sys
from pathlib import Path

from pocketllava import Llava

DEFAULTS = ["demo", str(Path(__file__).with_name("scene.png"))]
QUESTIONS = ("What is at the center?", "How many objects are there?", "What number is written?")
PROCESSES = 2

_models: list[Llava] = []  # this process's model, loaded once by `start`


def start(model: str) -> None:
    """Runs once in every process. More threads than physical cores, over all processes, are very slow."""
    threads = max(1, (os.cpu_count() or 1) // 2 // PROCESSES)  # half of the logical cores, shared out
    _models.append(Llava.load(model, n_threads=threads))


def answer(image: str, question: str) -> str:
    """Runs in a worker; only plain values travel between processes."""
    return _models[0].ask(image, question).text


def main(model: str, image: str) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(PROCESSES, initializer=start, initargs=(model,)) as pool:
        answers = pool.starmap(answer, [(image, question) for question in QUESTIONS])
    for question, text in zip(QUESTIONS, answers, strict=True):
        print(question, text)


if __name__ == "__main__":
    main(*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :])

"""Share one model among several threads: calls queue, and each gets its own answer.

python examples/threads.py [MODEL IMAGE]

One model answers one question at a time. Threads make a program responsive, not the model faster.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pocketllava import Llava

DEFAULTS = ["demo", str(Path(__file__).with_name("scene.png"))]
QUESTIONS = ("What is at the center?", "How many objects are there?", "What number is written?")


def main(model: str, image: str) -> None:
    with Llava.load(model) as llava, ThreadPoolExecutor(max_workers=3) as pool:
        answers = pool.map(lambda question: llava.ask(image, question).text, QUESTIONS)
        for question, answer in zip(QUESTIONS, answers, strict=True):
            print(question, answer)


if __name__ == "__main__":
    main(*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :])

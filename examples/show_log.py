"""Read llama.cpp's log through Python's logging; nothing of it reaches the terminal by itself.

python examples/show_log.py [MODEL IMAGE]

pocketllava's own warnings are in "pocketllava", llama.cpp's lines in "pocketllava.llama" at level DEBUG.
"""

import logging
import sys
from pathlib import Path

from pocketllava import Llava

DEFAULTS = ["demo", str(Path(__file__).with_name("scene.png"))]


class Lines(logging.Handler):
    """Collects llama.cpp's lines; a program would write them to a file."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(model: str, image: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    log, handler = logging.getLogger("pocketllava.llama"), Lines()
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    log.propagate = False
    with Llava.load(model) as llava:
        print(llava.ask(image, "What is at the center?").text)
    print("llama.cpp logged lines:", len(handler.lines) > 0)


if __name__ == "__main__":
    main(*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :])

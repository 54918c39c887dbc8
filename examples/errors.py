"""Handle errors: every one is a PocketLlavaError, and its message is one line to show to a user.

python examples/errors.py [MODEL IMAGE]
"""

import sys
from pathlib import Path

from pocketllava import ContextOverflow, ImageError, Llava, ModelNotFound, PocketLlavaError

DEFAULTS = ["demo", str(Path(__file__).with_name("scene.png"))]


def main(model: str, image: str) -> None:
    """Catch the kinds that a program can do something about, and the base class for the rest."""
    try:
        Llava.load("no-such-model")
    except ModelNotFound as error:
        print("model:", error)
    with Llava.load(model) as llava:
        try:
            llava.ask(__file__, "What is in this picture?")
        except ImageError as error:
            print("image:", error)
        try:
            llava.ask(image, "and " * 5000)
        except ContextOverflow as error:
            print(f"prompt: needs {error.needed} tokens, there is room for {error.available}")
        try:
            llava.chat([])
        except PocketLlavaError as error:
            print("other:", error)
        print("still loaded:", llava.ask(image, "What is at the center?").text)


if __name__ == "__main__":
    main(*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :])

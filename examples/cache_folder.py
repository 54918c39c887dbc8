"""Keep encoded and evaluated images on disk, so that another process starts where this one stopped.

python examples/cache_folder.py [MODEL IMAGE]
"""

import sys
import tempfile
from pathlib import Path

from pocketllava import Llava

DEFAULTS = ["demo", str(Path(__file__).with_name("scene.png"))]
QUESTION = "What is at the center?"


def main(model: str, image: str) -> None:
    """Loading twice stands for two processes. A real program gives a folder that stays."""
    with tempfile.TemporaryDirectory() as folder:
        for run in ("first", "second"):
            with Llava.load(model, cache_dir=folder, cache_bytes=10**9, keep_prefixes=True) as llava:
                answer = llava.ask(image, QUESTION)
                usage = answer.usage
                print(f"{run}: {answer.text} ({usage.cached_tokens} of {usage.prompt_tokens} tokens cached)")
        files = sorted(path.suffix for path in Path(folder).rglob("*.*") if path.is_file())
        print("in the folder:", ", ".join(files))


if __name__ == "__main__":
    main(*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :])

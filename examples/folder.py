"""Caption every image of a folder into a JSONL file; a bad file is reported and skipped.

python examples/folder.py [MODEL IMAGE]

The folder is the one that holds IMAGE.
"""

import json
import sys
from pathlib import Path

from pocketllava import ImageError, Llava

DEFAULTS = ["demo", str(Path(__file__).with_name("scene.png"))]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff"}


def main(model: str, image: str) -> None:
    images = sorted(path for path in Path(image).parent.iterdir() if path.suffix.lower() in SUFFIXES)
    with Llava.load(model) as llava:
        for path in images:
            try:
                answer = llava.ask(path, "Describe the image.")
            except ImageError as error:
                print(error, file=sys.stderr)
                continue
            print(json.dumps({"image": path.name, "caption": answer.text}))


if __name__ == "__main__":
    main(*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :])

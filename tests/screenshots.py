"""The page's pictures in docs/images, light and dark: python tests/screenshots.py"""

import io
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from web_page import CHROMIUM, api, conversation, opened, serving

from pocketllava.models.demo import scenes

FOLDER = Path(__file__).parents[1] / "docs" / "images"
MAX_BYTES = 150_000
N_SCENES, WORDS = 200, "green square"


def main():
    """Ask the demo model, search an album that it made, and keep what is seen."""
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("--album", str(captioned(Path(folder) / "scenes"))) as address,
        api.sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            with shown(browser, address, scheme) as page:
                conversation(page, "Describe the image.")
                save(page.screenshot(), FOLDER / f"page-{scheme}.png")
            with shown(browser, address, scheme) as page:
                page.click("#open-album")
                page.fill("#album-words", WORDS)
                page.press("#album-words", "Enter")
                page.locator("#album-status", has_text="best first").wait_for()
                page.wait_for_load_state("networkidle")
                save(page.screenshot(), FOLDER / f"album-{scheme}.png")
        browser.close()


@contextmanager
def shown(browser, address, scheme):
    """The page in one of its two colors."""
    size = {"width": 1120, "height": 760}
    with opened(browser, address, color_scheme=scheme, reduced_motion="reduce", viewport=size) as page:
        yield page


def captioned(folder):
    """A folder of scenes that the demo model was not trained on, with its album."""
    folder.mkdir()
    for n in range(N_SCENES):
        scenes.scene(scenes.HELD_OUT_SEEDS.start + n).draw().save(folder / f"scene-{n:03d}.png")
    subprocess.run([sys.executable, "-m", "pocketllava", "caption", "demo", str(folder), "-q"], check=True)
    return folder


def save(png, path):
    """As few bytes as 256 colors take."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        file, "PNG", optimize=True
    )
    assert file.tell() <= MAX_BYTES, f"{path.name}: {file.tell()} bytes"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(file.getvalue())


if __name__ == "__main__":
    main()

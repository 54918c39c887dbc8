"""The page's pictures in docs/images, light and dark: python tests/screenshots.py"""

import io
from pathlib import Path

from PIL import Image
from web_page import CHROMIUM, api, conversation, opened, serving

FOLDER = Path(__file__).parents[1] / "docs" / "images"
MAX_BYTES = 150_000


def main():
    """Ask the demo model, and keep what is seen."""
    with serving() as address, api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            size = {"width": 1120, "height": 760}
            with opened(
                browser, address, color_scheme=scheme, reduced_motion="reduce", viewport=size
            ) as page:
                conversation(page, "Describe the image.")
                save(page.screenshot(), FOLDER / f"page-{scheme}.png")
        browser.close()


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

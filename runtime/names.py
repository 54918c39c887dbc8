"""A name or a path -> a bundle: a folder that `pocketllava convert` made, or "demo", the model in the package.

Knows where the demo's bundle is kept and how it comes to be there; no engine.
"""

from __future__ import annotations

import hashlib
from importlib.resources import as_file, files
from os import PathLike
from pathlib import Path

from pocketllava.errors import BundleError, ModelNotFound
from pocketllava.models import Bundle
from pocketllava.models.files import cache_folder

DEMO = "demo"
DEMO_QUANT, DEMO_MMPROJ = "Q4_K_M", "F16"
WEIGHTS = "model.safetensors"


def open_bundle(name: str | PathLike[str]) -> Bundle:
    """Open a bundle by its folder or name. A folder called "demo" comes before the name.

    Raises ModelNotFound, BundleError; ConvertError if the demo cannot be converted.
    """
    return demo_bundle() if name == DEMO and not Path(name).exists() else Bundle.open(name)


def demo_bundle(quant: str = DEMO_QUANT, mmproj: str = DEMO_MMPROJ) -> Bundle:
    """The model that comes with the package, converted into the user's cache once (seconds)."""
    from pocketllava.convert import convert

    with as_file(files("pocketllava.models.demo") / "checkpoint") as checkpoint:
        weights = checkpoint / WEIGHTS
        if not weights.is_file():
            raise ModelNotFound(f"{DEMO}: this installation has no {weights}; reinstall pocketllava")
        identity = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
        folder = cache_folder() / f"demo-{identity}-{quant}-{mmproj}"
        try:
            return Bundle.open(folder)
        except (ModelNotFound, BundleError):
            return convert(checkpoint, folder, quant=quant, mmproj=mmproj, force=True)

"""A name or a path -> a bundle: a folder that `pocketllava convert` made, a model of the store, or "demo", the
model in the package.

Knows the cache folder of the demo's bundle, its conversion, and the names near a mistyped one; no engine.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.resources import as_file, files
from os import PathLike
from pathlib import Path

from filelock import FileLock

from pocketllava.errors import BundleError, InputError, ModelNotFound
from pocketllava.models import Bundle
from pocketllava.models.bundle import MANIFEST
from pocketllava.models.files import cache_folder, expanded
from pocketllava.models.store import Store, is_name
from pocketllava.settings import nearest

DEMO = "demo"
DEMO_QUANT, DEMO_MMPROJ = "Q4_K_M", "F16"
WEIGHTS = "model.safetensors"
SHOWN = 5  # bundles that lie beside one that is missing
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_bundle(name: str | PathLike[str]) -> Bundle:
    """Open a bundle by its folder, or by its name in the store. A folder comes before a name, "demo" included.

    Raises InputError for other types; ModelNotFound, BundleError; ConvertError if the demo cannot be converted.
    """
    if not isinstance(name, str | PathLike) or not os.fspath(name):
        raise InputError(f"model: found {name!r}, expected a bundle's folder or {DEMO!r}")
    folder = expanded(name)
    exists = _exists(folder)
    if name == DEMO and not _exists(folder / MANIFEST):
        return demo_bundle()
    store = _store() if not exists and isinstance(name, str) and is_name(name) else None
    if store is not None and store.has(str(name)):
        return Bundle.open(store.folder(str(name)))
    return Bundle.open(folder) if exists else _missing(str(name), folder)


def _exists(path: Path) -> bool:
    """Whether something is there. A text that cannot be a path is nothing."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _missing(name: str, folder: Path) -> Bundle:
    """Raises ModelNotFound: the command that converts a hub id, or the bundle that may have been meant."""
    if _HUB_ID.fullmatch(name) and not folder.parent.is_dir():
        raise ModelNotFound(
            f"{name}: no such folder, and a Hugging Face id must be downloaded first: pocketllava pull {name}, or"
            f" pocketllava convert {name} --out {folder.name}"
        )
    beside = _bundles(folder.parent)
    stored = _stored() if folder.parent == Path() else []
    bases = [other.partition(":")[0] for other in stored]
    names = [*beside, *([DEMO] if folder.parent == Path() else [])]
    there = f"; there are {', '.join(beside[:SHOWN])} beside it" if beside else ""
    there = there or (f"; the store has {', '.join(stored[:SHOWN])}" if stored else "")
    raise ModelNotFound(
        f"{name}: found nothing, expected a folder made by `pocketllava convert`, a name of `pocketllava list` or"
        f" {DEMO!r}{nearest(folder.name, [*names, *stored]) or nearest(folder.name, bases) or there}"
    )


def lease(bundle: Bundle) -> AbstractContextManager[None]:
    """While it is entered, the store keeps the bundle; nothing for a bundle elsewhere."""
    store = _store()
    return store.lease_of(bundle.folder) if store is not None else nullcontext()


def _store() -> Store | None:
    """This user's store; None for a user without a home, whose bundles have folders."""
    try:
        return Store.default()
    except InputError:
        return None


def _stored() -> list[str]:
    """Names of the store's models; a store that cannot be read has none to offer."""
    store = _store()
    with suppress(InputError):
        return store.names() if store is not None else []
    return []


def _bundles(folder: Path) -> list[str]:
    """Names of the bundles in a folder."""
    try:
        return sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    except (OSError, ValueError):
        return []


def demo_bundle(quant: str = DEMO_QUANT, mmproj: str = DEMO_MMPROJ) -> Bundle:
    """The model that comes with the package, converted into the user's cache once (seconds)."""
    from pocketllava.convert import convert

    with as_file(files("pocketllava.models.demo") / "checkpoint") as checkpoint:
        weights = checkpoint / WEIGHTS
        if not weights.is_file():
            raise ModelNotFound(f"{DEMO}: this installation has no {weights}; reinstall pocketllava")
        identity = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
        folder = cache_folder() / f"demo-{identity}-{quant}-{mmproj}"
        with suppress(ModelNotFound, BundleError):
            return Bundle.open(folder)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # several first uses at once convert it once
            with suppress(ModelNotFound, BundleError):
                return Bundle.open(folder)
            return convert(checkpoint, folder, quant=quant, mmproj=mmproj, force=True)

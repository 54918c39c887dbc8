"""A name or a path -> a bundle: a folder that `pocketllava convert` made, a model of the store, a GGUF text model with
its mmproj, or "demo", the model in the package.

Knows the cache folder of the demo's bundle, its conversion, and the names near a mistyped one; no engine.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.resources import as_file, files
from os import PathLike
from pathlib import Path

from filelock import FileLock

from pocketllava.errors import BundleError, InputError, ModelNotFound, UnsupportedOption
from pocketllava.models import Bundle
from pocketllava.models.bundle import MANIFEST
from pocketllava.models.files import cache_folder, expanded
from pocketllava.models.gguf_header import MAGIC, Part
from pocketllava.models.store import Store, is_name
from pocketllava.settings import nearest

logger = logging.getLogger("pocketllava")
DEMO = "demo"
DEMO_QUANT, DEMO_MMPROJ = "Q4_K_M", "F16"
WEIGHTS = "model.safetensors"
SHOWN = 5  # bundles that lie beside one that is missing
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_bundle(
    name: str | PathLike[str],
    *,
    mmproj: str | PathLike[str] | None = None,
    template: str | None = None,
    pad: bool | None = None,
) -> Bundle:
    """Open a bundle by its folder or by its name in the store, or a text model as it is.

    A folder comes before a name, "demo" included. mmproj, template and pad: of a text model without bundle.json.
    Raises InputError for other types; ModelNotFound, BundleError; ConvertError if the demo cannot be converted.
    """
    model = _text_model(name)
    if model is not None:
        return _open_pair(model, mmproj, template, pad)
    for option, value in (("mmproj", mmproj), ("template", template), ("pad", pad)):
        if value is not None:
            raise UnsupportedOption(
                f"{option}: {name} is a bundle, whose bundle.json says it; expected a GGUF text model, or its folder"
            )
    return _open(name)


def _text_model(name: str | PathLike[str]) -> Path | Part | None:
    """The text model of a pair without bundle.json; None for everything else. Raises InputError, ModelNotFound."""
    if not isinstance(name, str | PathLike) or not os.fspath(name):
        return None
    path = expanded(name)
    try:
        if path.is_file():
            return None if name == DEMO else _in_llamafile(path)
        pair = path.is_dir() and not (path / MANIFEST).exists() and any(path.glob("*.[gG][gG][uU][fF]"))
    except (OSError, ValueError):
        return None
    if not pair:
        return None
    from pocketllava.convert.foreign import only_text_model  # takes half a second to import

    return only_text_model(path)


def _in_llamafile(path: Path) -> Path | Part:
    """The text model in a llamafile; any other file itself. Raises BundleError, DiskFull, InputError."""
    with suppress(OSError), path.open("rb") as file:
        if file.read(4) == MAGIC:
            return path
    from pocketllava.convert.foreign import only_text_model
    from pocketllava.convert.llamafile import is_llamafile

    return only_text_model(path) if is_llamafile(path) else path


def _open_pair(
    model: Path | Part, mmproj: str | PathLike[str] | None, template: str | None, pad: bool | None
) -> Bundle:
    """A text model with the projector that was named, or lies beside it; what had to be assumed is said once."""
    alone = mmproj is None and template is None and pad is None
    if alone and isinstance(model, Path) and (bundle := _around(model)) is not None:
        return bundle
    from pocketllava.convert import foreign
    from pocketllava.convert.pair import style

    foreign.text_model(model)  # what it is, before anything is looked for
    projectors = [expanded(mmproj)] if mmproj is not None else foreign.beside(model)
    pair = foreign.pair(model, projectors)
    how = style(pair.text, pair.projector.info, template, pad)
    bundle, fresh = foreign.remembered(pair, how)
    if fresh:
        logger.warning("%s", foreign.said(pair, how))
    return bundle


def _around(model: Path) -> Bundle | None:
    """The bundle whose text model a file is."""
    with suppress(ModelNotFound, BundleError):
        bundle = Bundle.open(model.parent)
        return bundle if bundle.model.samefile(model) else None
    return None


def _open(name: str | PathLike[str]) -> Bundle:
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

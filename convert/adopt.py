"""Pairs that other programs keep -> a list of what there is, and models of the store that refer to them.

Knows the steps; where files lie is catalog.py's, who belongs to whom foreign.py's, the folder is the store's.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketllava.convert import foreign
from pocketllava.convert.foreign import OTHERS, OWN, REFER, TEXTS, Pair, shared_words
from pocketllava.convert.llamafile import is_extracted, is_llamafile
from pocketllava.convert.pair import Style
from pocketllava.errors import BundleError, InputError, ModelNotFound, PocketLlavaError
from pocketllava.models import catalog
from pocketllava.models.bundle import MANIFEST, Bundle
from pocketllava.models.catalog import Group, Root
from pocketllava.models.file_type import type_name
from pocketllava.models.files import expanded
from pocketllava.models.gguf_header import ARCHITECTURE, Header
from pocketllava.models.manifest import Source
from pocketllava.models.store import MAX_BASE, MAX_TAG, Store, is_name, parsed
from pocketllava.settings import nearest

OLLAMA = "ollama:"
_TYPE = re.compile(r"[-_.](?:i?q\d(?:_[a-z0-9]+)*|b?f16|fp16|f32)$")


@dataclass(frozen=True)
class Row:
    """What lies somewhere: a pair that can be asked, or why it cannot.

    kind: "LLaVA-1.5", "LLaVA-1.6", or another model's name. bytes: of the files that are not needed twice.
    """

    app: str
    name: str
    kind: str
    types: str
    model: str
    mmproj: str
    bytes: int
    faults: tuple[str, ...] = ()
    problem: str | None = None


def known_roots() -> list[Root]:
    """Of this user on this machine."""
    home = expanded("~")
    return catalog.roots(sys.platform, os.environ, home) if home.is_absolute() else []


def scan(roots: Iterable[Root]) -> Iterator[Row]:
    """Every text model of other programs with a projector beside it."""
    for group in catalog.groups(roots):
        for model in group.models:
            projectors = _near(group, model)
            if projectors:
                yield _row(group, model, projectors)


def found(text: str, mmproj: str | None, roots: Sequence[Root]) -> Pair:
    """The pair that a path, a name of Ollama's or a name of `scan` means.

    Raises InputError, ModelNotFound, BundleError.
    """
    if text.startswith(OLLAMA):
        return _of_group(catalog.ollama_model(text.removeprefix(OLLAMA), roots), mmproj)
    path = expanded(text)
    try:
        exists = path.exists()
    except (OSError, ValueError):
        exists = False
    if not exists:
        return _of_group(_named(text, roots), mmproj)
    folder = path if path.is_dir() else path.parent
    if (folder / MANIFEST).exists():
        raise InputError(
            f"{folder}: a bundle already, with its own {MANIFEST}; its folder can be asked as it is"
        )
    model = foreign.only_text_model(path) if path.is_dir() or is_llamafile(path) else path
    foreign.text_model(model)
    projectors = [expanded(mmproj)] if mmproj else foreign.beside(model)
    return foreign.pair(model, projectors, owner=catalog.owner_of(path, roots))


def adopt(pair: Pair, how: Style, name: str, *, files: str = REFER, store: Store | None = None) -> Bundle:
    """Make a model of the store of a pair. Raises InputError, StateError, ConvertError, BundleError."""
    store = store or Store.default()
    with store.create(name) as staging:
        foreign.make(pair, staging, how, files=files)
    return Bundle.open(store.folder(name))


def usual_files(pair: Pair) -> str:
    """What is done with files where nothing is said: those extracted from a llamafile become the store's."""
    return OWN if is_extracted(pair.text.path) else REFER


def default_name(pair: Pair) -> str:
    """The store's name for a pair: what its program calls it; the type is the tag of one that has none."""
    last = pair.source.id.removeprefix(OLLAMA).rpartition("/")[2].lower()
    base, _, tag = last.partition(":")
    base = _clean(_TYPE.sub("", base), MAX_BASE) or "model"
    kind = type_name(pair.text.keys).lower()
    tag = _clean(tag, MAX_TAG) or ("" if kind == "unknown" else kind)
    name = f"{base}:{tag}" if tag else base
    return parsed(name if is_name(name) else f"model-{base}:{tag}")


def _clean(text: str, most: int) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text)[:most].strip("._-")


def _near(group: Group, model: Path) -> tuple[Path, ...]:
    """The projectors that may be a model's: where several models share a folder, those with a word of its name."""
    if not group.flat:
        return group.projectors
    return tuple(path for path in group.projectors if shared_words(path.name, model.name))


def _of_group(group: Group, mmproj: str | None) -> Pair:
    if len(group.models) > 1:
        names = ", ".join(str(path) for path in group.models[:5])
        raise InputError(
            f"{group.name}: found {len(group.models)} text models ({names}); name one of the files"
        )
    projectors = (expanded(mmproj),) if mmproj else group.projectors
    return _pair(group, group.models[0], projectors)


def _pair(group: Group, model: Path, projectors: Sequence[Path]) -> Pair:
    source = Source(group.name, group.revision, {})
    return foreign.pair(model, projectors, source=source, owner=group.app, template=group.template)


def _named(text: str, roots: Sequence[Root]) -> Group:
    groups = {group.name: group for group in catalog.groups(roots)}
    if text in groups:
        return groups[text]
    hint = nearest(text, groups) or "; `pocketllava import --scan` lists what other programs have"
    raise ModelNotFound(
        f"{text}: found nothing, expected a GGUF text model, its folder, or ollama:NAME{hint}"
    )


def _row(group: Group, model: Path, projectors: Sequence[Path]) -> Row:
    name = str(model) if group.flat or len(group.models) > 1 else group.name
    try:
        pair = _pair(group, model, projectors)
    except PocketLlavaError as error:
        kind = _other(model, projectors[0])
        return Row(group.app, name, kind, "", str(model), str(projectors[0]), 0, (), str(error))
    projector = pair.projector
    n_bytes = pair.text.file_bytes + (0 if projector.faults else projector.header.file_bytes)
    types = f"{type_name(pair.text.keys)} + {type_name(projector.header.keys)}"
    kind = "LLaVA-1.6" if pair.tiled else "LLaVA-1.5"
    return Row(group.app, name, kind, types, str(model), str(projector.path), n_bytes, projector.faults)


def _other(model: Path, projector: Path) -> str:
    """What another pair's headers say that it is."""
    for path, key, names in ((projector, "clip.projector_type", OTHERS), (model, ARCHITECTURE, TEXTS)):
        try:
            value = str(Header.read(path).keys.get(key, ""))
        except BundleError:
            return "damaged"
        if value in names:
            return names[value]
    return "other"

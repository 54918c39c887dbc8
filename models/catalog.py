"""Where other programs keep their models, and which GGUF files lie there.

Knows folders and names: Ollama's manifests and blobs, LM Studio, llama.cpp, the hub's cache, Jan and GPT4All, on
Linux, macOS and Windows. Walks those folders only, and only so far; reads each file's kind.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pocketllava.errors import BundleError, ModelNotFound
from pocketllava.models.files import read_regular
from pocketllava.models.gguf_header import architecture

Layout = Literal["ollama", "hub", "tree", "flat"]
MAX_DEPTH = 6  # folders below a root
MAX_ENTRIES = 20_000  # of a root: a cache with hundreds of models has some thousands
MAX_MANIFEST_BYTES = 1 << 20
MAX_TEMPLATE_BYTES = 1 << 16
PROJECTOR = "clip"  # general.architecture
OLLAMA = "Ollama"
DEFAULT_HOST, DEFAULT_OWNER, DEFAULT_TAG = "registry.ollama.ai", "library", "latest"
MEDIA = "application/vnd.ollama.image."
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}(?::\d{1,5})?")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_REPO = re.compile(r"models--(.+?)--(.+)")
# What only such a prompt holds, in Ollama's template of a model.
MARKS = {
    "<|im_start|>": "chatml",
    "<|start_header_id|>": "llama-3",
    "[INST]": "mistral",
    "USER:": "vicuna_v1",
}


@dataclass(frozen=True)
class Root:
    """A folder of a program, and how files lie in it."""

    app: str
    folder: Path
    layout: Layout


@dataclass(frozen=True)
class Group:
    """GGUF files that lie together. name: such as ollama:llava:7b, or owner/name. template: what its program says.

    flat: files of several models lie in one folder, so that only their names say which belong together.
    """

    app: str
    name: str
    models: tuple[Path, ...]
    projectors: tuple[Path, ...]
    template: str | None = None
    revision: str | None = None
    flat: bool = False


def roots(platform: str, environment: Mapping[str, str], home: Path) -> list[Root]:
    """Every folder where models may lie, whether it is there or not. platform: as sys.platform names it."""
    path = type(home)
    system = {"darwin": "mac", "win32": "windows"}.get(platform, "linux")

    def variable(*names: str) -> Path | None:
        text = next((environment[name] for name in names if environment.get(name)), None)
        return None if text is None else home / text[2:] if text[:2] in ("~/", "~\\") else path(text)

    roaming = variable("APPDATA") or home / "AppData" / "Roaming"
    local = variable("LOCALAPPDATA") or home / "AppData" / "Local"
    support = home / "Library" / "Application Support"
    data = variable("XDG_DATA_HOME") or home / ".local" / "share"
    caches = variable("XDG_CACHE_HOME") or home / ".cache"
    hub = variable("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    if hub is None:
        hub_home = variable("HF_HOME")
        hub = (hub_home if hub_home is not None else caches / "huggingface") / "hub"
    ollama = [variable("OLLAMA_MODELS") or home / ".ollama" / "models"]
    if system == "linux":
        ollama.append(path("/usr/share/ollama/.ollama/models"))  # the service's
    old_llama = {"mac": home / "Library" / "Caches", "windows": local, "linux": caches}[system] / "llama.cpp"
    jan = {"mac": support, "windows": roaming, "linux": data}[system] / "Jan" / "data"
    gpt4all = {"mac": support, "windows": local, "linux": data}[system] / "nomic.ai" / "GPT4All"
    found = [
        *(Root(OLLAMA, folder, "ollama") for folder in ollama),
        Root("LM Studio", home / ".lmstudio" / "models", "tree"),
        Root("LM Studio", home / ".cache" / "lm-studio" / "models", "tree"),
        Root("llama.cpp", variable("LLAMA_CACHE") or old_llama, "flat"),
        Root("Hugging Face", hub, "hub"),
        Root("Jan", jan, "tree"),
        Root("Jan", home / "jan" / "models", "tree"),
        Root("GPT4All", gpt4all, "flat"),
    ]
    return list({root.folder: root for root in reversed(found)}.values())[::-1]


def groups(found: Iterable[Root]) -> Iterator[Group]:
    """What lies in the roots: groups of files that have a text model and a projector. Unreadable folders are empty."""
    seen: set[Path] = set()
    for root in found:
        for group in _in_root(root):
            place = group.models[0].resolve()
            if place not in seen:
                seen.add(place)
                yield group


def owner_of(path: Path, found: Iterable[Root]) -> str | None:
    """The program in whose folder a file lies."""
    places = [path.absolute(), path.resolve()]
    inside = (
        r.app for r in found for p in places if r.folder in p.parents or r.folder.resolve() in p.parents
    )
    return next(inside, None)


def ollama_model(name: str, found: Iterable[Root]) -> Group:
    """A model of Ollama's by its name there. Raises ModelNotFound, BundleError for what is no pair."""
    host, owner, model, tag = _ollama_name(name)
    tried = []
    for root in found:
        if root.layout == "ollama":
            path = root.folder / "manifests" / host.replace(":", "%3A") / owner / model / tag
            path = path if path.is_file() else root.folder / "manifests" / host / owner / model / tag
            tried.append(str(root.folder))
            if path.is_file():
                return _ollama_group(root, path, f"ollama:{name}")
    there = [group.name for root in found if root.layout == "ollama" for group in _ollama(root)]
    known = f"; there are {', '.join(there[:5])}" if there else ""
    raise ModelNotFound(
        f"ollama:{name}: Ollama has no such model in {' or '.join(tried) or 'any folder'}{known}"
    )


def _ollama_name(name: str) -> tuple[str, str, str, str]:
    """Host, owner, model and tag. Raises ModelNotFound for what cannot be a name."""
    place, _, last = name.rpartition("/")
    model, _, tag = last.partition(":")
    parts = place.split("/") if place else []
    host = parts.pop(0) if len(parts) > 1 else DEFAULT_HOST
    owner = parts.pop(0) if parts else DEFAULT_OWNER
    names = (owner, model, tag or DEFAULT_TAG)
    if parts or not _HOST.fullmatch(host) or not all(_PART.fullmatch(part) for part in names):
        raise ModelNotFound(f"ollama:{name}: not a name of Ollama's, expected [host/][owner/]model[:tag]")
    return host, owner, model, tag or DEFAULT_TAG


def _in_root(root: Root) -> Iterator[Group]:
    if root.layout == "ollama":
        yield from _ollama(root)
        return
    by_place: dict[Path, list[Path]] = {}
    for path in walk(root.folder):
        if path.suffix.lower() == ".gguf":
            by_place.setdefault(_place(root, path), []).append(path)
    for place, files in by_place.items():
        group = _group(root, place, files)
        if group.models and group.projectors:
            yield group


def _place(root: Root, path: Path) -> Path:
    """The folder whose files belong together."""
    if root.layout == "flat":
        return root.folder
    if root.layout == "hub":  # models--owner--name/snapshots/<commit>/...
        parts = path.relative_to(root.folder).parts
        return root.folder.joinpath(*parts[: min(3, len(parts) - 1)])
    return path.parent


def _group(root: Root, place: Path, files: list[Path]) -> Group:
    kinds = {path: architecture(path) for path in sorted(files)}
    projectors = tuple(path for path, kind in kinds.items() if kind == PROJECTOR)
    models = tuple(path for path, kind in kinds.items() if kind not in (None, PROJECTOR))
    name, revision = place.relative_to(root.folder).as_posix(), None
    if root.layout == "hub" and (repo := _REPO.fullmatch(name.partition("/")[0])):
        name, revision = f"{repo[1]}/{repo[2]}", place.name
    return Group(root.app, name, models, projectors, None, revision, root.layout == "flat")


def walk(folder: Path) -> Iterator[Path]:
    """Regular files below a folder, those that links name too, but not what lies in linked folders; bounded."""
    left, waiting = MAX_ENTRIES, [(folder, 0)]
    while waiting and left > 0:
        place, depth = waiting.pop(0)
        try:
            with os.scandir(place) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in listed[:left]:
            left -= 1
            try:
                if entry.is_dir(follow_symlinks=False) and depth < MAX_DEPTH:
                    waiting.append((Path(entry.path), depth + 1))
                elif entry.is_file():
                    yield Path(entry.path)
            except OSError:
                continue


def _ollama(root: Root) -> Iterator[Group]:
    manifests = root.folder / "manifests"
    for path in walk(manifests):
        parts = path.relative_to(manifests).parts
        if len(parts) == 4 and all(_HOST.fullmatch(part.replace("%3A", ":")) for part in parts):
            host, owner, model, tag = parts
            short = model if (host, owner) == (DEFAULT_HOST, DEFAULT_OWNER) else f"{owner}/{model}"
            long = short if host == DEFAULT_HOST else f"{host.replace('%3A', ':')}/{short}"
            try:
                yield _ollama_group(root, path, f"ollama:{long}:{tag}")
            except BundleError:  # a text model alone, or no manifest
                continue


def _ollama_group(root: Root, path: Path, name: str) -> Group:
    """Raises BundleError for a manifest that is damaged, or names no pair."""
    layers = ollama_layers(_json(path), path)
    blobs = {
        kind: [_blob(root, digest) for digest in layers.get(kind, ())] for kind in ("model", "projector")
    }
    for blob in (*blobs["model"], *blobs["projector"]):
        if not blob.is_file():
            raise BundleError(f"{name}: Ollama has no {blob.name[:19]}... any more; `ollama pull` it again")
    if not blobs["model"] or not blobs["projector"]:
        lacking = (
            "text model" if not blobs["model"] else "projector: it is a text model alone, or not a LLaVA"
        )
        raise BundleError(f"{name}: Ollama's manifest names no {lacking}")
    template = _template(root, layers.get("template", ()))
    return Group(OLLAMA, name, tuple(blobs["model"][:1]), tuple(blobs["projector"]), template)


def _json(path: Path) -> Any:
    try:
        return json.loads(read_regular(path, MAX_MANIFEST_BYTES))
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not a manifest of Ollama's; `ollama pull` it again") from error


def ollama_layers(document: Any, path: Path) -> dict[str, tuple[str, ...]]:
    """The SHA-256 of a manifest's blobs, by kind: "model", "projector", "template". Raises BundleError."""
    layers = document.get("layers") if type(document) is dict else None
    found: dict[str, tuple[str, ...]] = {}
    for layer in layers if type(layers) is list else ():
        kind, digest = (layer.get("mediaType"), layer.get("digest")) if type(layer) is dict else (None, None)
        match = _DIGEST.fullmatch(digest) if type(digest) is str else None
        if match is None or type(kind) is not str:
            raise BundleError(
                f"{path}: a layer names no SHA-256, not a manifest of Ollama's; `ollama pull` it again"
            )
        found[kind.removeprefix(MEDIA)] = (*found.get(kind.removeprefix(MEDIA), ()), match[1])
    if not found:
        raise BundleError(f"{path}: names no layers, not a manifest of Ollama's; `ollama pull` it again")
    return found


def _blob(root: Root, digest: str) -> Path:
    """Its file; older versions wrote a colon."""
    new, old = (root.folder / "blobs" / f"sha256{sign}{digest}" for sign in "-:")
    return old if os.name != "nt" and not new.exists() and old.exists() else new


def _template(root: Root, digests: Iterable[str]) -> str | None:
    """The prompt that Ollama's own template is, by what only such a prompt holds."""
    for digest in digests:
        try:
            text = read_regular(_blob(root, digest), MAX_TEMPLATE_BYTES).decode("utf-8", "replace")
        except OSError:
            continue
        return next((name for mark, name in MARKS.items() if mark in text), None)
    return None

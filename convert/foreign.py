"""GGUF files that lie somewhere on this disk -> a bundle that refers to them, in a folder of its own.

Knows which projector belongs to a text model: both headers are read and their widths compared. A projector with faults
is mended in a sidecar file; the text model is never copied, unless that is asked for. Knows no engine.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

from filelock import FileLock

from pocketllava.convert.llamafile import copy_of, gguf_parts
from pocketllava.convert.pair import Style, manifest, write_manifest
from pocketllava.convert.repair import Repair, examine, repair
from pocketllava.errors import BundleError, ConvertError, DiskFull, InputError, ModelNotFound
from pocketllava.models.bundle import MMPROJ, MODEL, Bundle, describe_file, file_identity, sha256
from pocketllava.models.file_type import type_name
from pocketllava.models.files import atomic_write, cache_folder, utf8
from pocketllava.models.gguf_header import ARCHITECTURE, Header, Part, architecture
from pocketllava.models.manifest import FileRecord, Reference, Source
from pocketllava.models.mmproj_contract import check_mmproj
from pocketllava.models.text_contract import check_text
from pocketllava.version import __version__

PROJECTOR, TEXT = "clip", "llama"  # general.architecture
PROJECTOR_TYPES = ("F16", "BF16", "Q8_0", "F32", "Q4_0")  # which of several is taken
REFER, LINK, COPY, OWN = "refer", "link", "copy", "own"
MAX_BESIDE = 1000  # files of a folder that are looked at
_HASH = re.compile(r"(?:sha256[-:])?([0-9a-f]{64})")  # a blob's name: Ollama's, and the hub's cache
_WORD = re.compile(r"[a-z]+|\d+")
# clip.projector_type of other models' files, by the names that people know them by
OTHERS = {
    "qwen2vl_merger": "Qwen2-VL", "qwen2.5vl_merger": "Qwen2.5-VL", "qwen3vl_merger": "Qwen3-VL", "gemma3": "Gemma 3",
    "gemma3nv": "Gemma 3n", "gemma4v": "Gemma 4", "gemma4uv": "Gemma 4", "ldp": "MobileVLM", "ldpv2": "MobileVLM V2",
    "resampler": "MiniCPM-V", "minicpmv4_6": "MiniCPM-V 4.6", "adapter": "GLM-Edge", "glm4v": "GLM-4V",
    "cogvlm": "CogVLM", "idefics3": "SmolVLM", "pixtral": "Pixtral", "internvl": "InternVL", "llama4": "Llama 4",
    "lfm2": "LFM2-VL", "kimivl": "Kimi-VL", "janus_pro": "Janus-Pro", "phi4": "Phi-4", "ultravox": "Ultravox",
    "granite4_vision": "Granite Vision 4", "deepseekocr": "DeepSeek-OCR",
}  # fmt: skip
TEXTS = {
    "qwen2vl": "Qwen2-VL", "qwen25vl": "Qwen2.5-VL", "qwen3vl": "Qwen3-VL", "gemma3": "Gemma 3", "gemma3n": "Gemma 3n",
    "gemma4": "Gemma 4", "llama4": "Llama 4", "mllama": "Llama 3.2 Vision", "minicpm": "MiniCPM", "phi2": "Phi-2",
    "phi3": "Phi-3", "qwen2": "Qwen2", "qwen3": "Qwen3", "mamba": "Mamba", "granite": "Granite", "lfm2": "LFM2",
    "deepseek2": "DeepSeek",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A text model and its projector, whose headers were checked. owner: the program that they belong to.

    source: where they are from. others: projectors that would have fitted too.
    """

    text: Header
    projector: Repair
    source: Source
    owner: str | None = None
    template: str | None = None
    others: tuple[str, ...] = ()

    @property
    def tiled(self) -> bool:
        """Whether it is a LLaVA-1.6."""
        return self.projector.info.tiling is not None


def pair(
    model: Path | Part,
    projectors: Iterable[Path | Part],
    *,
    source: Source | None = None,
    owner: str | None = None,
    template: str | None = None,
) -> Pair:
    """The text model with the best of the projectors. Raises BundleError, InputError where none is the best."""
    text = text_model(model)
    fitting, refused = [], ""
    for path in projectors:
        try:
            fitting.append(_fitting(text, path))
        except BundleError as error:
            refused = refused or str(error)
    if not fitting:
        raise BundleError(
            refused
            or f"{model}: a text model alone, found no mmproj beside it; give its vision part with --mmproj FILE"
        )
    best = _best(text, fitting)
    others = tuple(each.header.name for each in fitting if each is not best)
    return Pair(text, best, source or Source(_name(text.path), None, {}), owner, template, others)


def beside(model: Path | Part) -> Sequence[Path | Part]:
    """The projectors in a text model's folder or llamafile, else those called mmproj in the folder above it."""
    if isinstance(model, Part):
        return [part for part in gguf_parts(model.path) if architecture(part) == PROJECTOR]
    own = [path for path in _gguf_files(model.parent) if architecture(path) == PROJECTOR]
    above = (path for path in _gguf_files(model.parent.parent) if "mmproj" in path.name.lower())
    return own or [path for path in above if architecture(path) == PROJECTOR]


def only_text_model(folder: Path) -> Path | Part:
    """The one text model in a folder, or in a llamafile. Raises InputError, ModelNotFound; what gguf_parts does."""
    kinds = {
        file: architecture(file) for file in (_gguf_files(folder) if folder.is_dir() else gguf_parts(folder))
    }
    models = [file for file, kind in kinds.items() if kind == TEXT]
    if len(models) == 1:
        return models[0]
    if models:
        names = ", ".join(file.name for file in models[:5])
        raise InputError(f"{folder}: found {len(models)} text models ({names}); name one of the files")
    found = ", ".join(f"{file.name} of architecture {kind!r}" for file, kind in islice(kinds.items(), 5))
    raise ModelNotFound(
        f"{folder}: found {found or 'no GGUF file'}, expected a LLaVA's text model and its mmproj"
    )


def text_model(place: Path | Part) -> Header:
    """A text model's header, checked. Raises BundleError, which says what another file is."""
    header = Header.read(place)
    path = header.path
    kind = header.keys.get(ARCHITECTURE)
    if kind == PROJECTOR:
        raise BundleError(
            f"{path}: an mmproj alone, the vision part of a model; give its text model, and this file with --mmproj"
        )
    if kind in TEXTS:
        raise BundleError(
            f"{path}: a text model of architecture {kind!r} ({TEXTS[str(kind)]}), expected 'llama', a LLaVA's"
        )
    check_text(header)
    return header


def make(pair: Pair, folder: Path, how: Style, *, sidecar: Path | None = None, files: str = REFER) -> Bundle:
    """Write a bundle into a folder. Raises ConvertError, BundleError.

    sidecar: where a mended projector is to lie, if not in the folder. files: REFER to them, LINK (hard links, where
    the disk and their owner allow it), COPY them, or make them the bundle's OWN (links, else copies).
    """
    vision = pair.projector.header
    if pair.projector.faults or vision.part:  # libmtmd opens a path, not a place in a file
        vision = _mended(pair.projector, sidecar or folder / MMPROJ)
        placed = {MMPROJ: _own(vision, folder)}
    else:
        placed = {MMPROJ: _place(vision, folder / MMPROJ, files, pair.owner)}
    placed[MODEL] = _place(pair.text, folder / MODEL, files, pair.owner)
    values = manifest(
        pair.text,
        vision,
        pair.projector.info,
        how,
        files={name: placed[name].record for name in (MODEL, MMPROJ)},
        source=pair.source,
        references={name: file.reference for name, file in placed.items() if file.reference is not None},
    )
    write_manifest(folder, values)
    return Bundle.open(folder)


def remembered(pair: Pair, how: Style) -> tuple[Bundle, bool]:
    """The pair's bundle in the cache folder, made with its first use; and whether this is the first.

    Several first uses at once make it once. Raises ConvertError, BundleError, InputError.
    """
    cache = cache_folder()
    identity = file_identity(pair.projector.path, pair.projector.header)
    own = (None if pair.projector.header.part else named_hash(pair.projector.path)) or identity
    sidecar = cache / "projectors" / f"{_slug(pair.projector.path)}-{_key(own)}.gguf"
    text = pair.text.path.absolute(), pair.text.start, file_identity(pair.text.path, pair.text)
    parts = (__version__, *text, pair.projector.path.absolute(), identity, how, pair.source, pair.owner)
    folder = cache / "pairs" / f"{_slug(pair.text.path)}-{_key(*parts)}"
    with suppress(ModelNotFound, BundleError):
        return Bundle.open(folder), False
    with _disk_errors(cache):
        for parent in (folder, sidecar.parent):
            parent.mkdir(parents=True, exist_ok=True)
        with FileLock(sidecar.with_suffix(".lock")), FileLock(folder.with_name(f".{folder.name}.lock")):
            with suppress(ModelNotFound, BundleError):
                return Bundle.open(folder), False
            return make(pair, folder, how, sidecar=sidecar), True


def said(pair: Pair, how: Style) -> str:
    """What was chosen, mended and assumed, in one line."""
    model, vision = pair.text.name, pair.projector.header.name
    if _HASH.fullmatch(model):  # blobs tell nobody anything
        model, vision = pair.source.id, "its projector"
    chosen = f"{model}: a LLaVA-1.{6 if pair.tiled else 5} with {vision}"
    others = f" ({type_name(pair.projector.header.keys)}, rather than {', '.join(pair.others[:3])})"
    mended = "; mended in a copy: " + "; ".join(pair.projector.faults) if pair.projector.faults else ""
    pictures = "cut into tiles" if pair.tiled else "padded to a square" if how.pad else "cropped"
    return (
        f"{chosen}{others if pair.others else ''}{mended}; assumed: prompt {how.name}, pictures {pictures}"
        " (--template, --pad and --crop say otherwise)"
    )


def named_hash(path: Path) -> str | None:
    """The SHA-256 that a blob's own name is, through links: Ollama's, and the hub's cache."""
    match = _HASH.fullmatch(path.resolve().name)
    return match[1] if match else None


@dataclass(frozen=True)
class _Placed:
    record: FileRecord
    reference: Reference | None = None


def _own(header: Header, folder: Path) -> _Placed:
    """A file that was made here, in the folder or beside it."""
    reference = Reference(str(header.path.absolute())) if header.path.parent != folder else None
    return _Placed(describe_file(header, sha256(header.path)), reference)


def _place(header: Header, at: Path, files: str, owner: str | None) -> _Placed:
    source, known = header.path, None if header.part else named_hash(header.path)
    if header.part is None and files in (LINK, OWN):
        with suppress(OSError):  # another disk, another user's file, a file system without links
            at.hardlink_to(source.resolve())
            return _Placed(describe_file(header, known or sha256(source)))
    if files in (COPY, OWN):
        return _Placed(describe_file(header, _copied(header, known, at)))
    return _Placed(describe_file(header, known), Reference(str(source.absolute()), owner, header.start))


def _copied(header: Header, expected: str | None, at: Path) -> str:
    """SHA-256 of the copy. Raises DiskFull, BundleError for a blob whose name it is not, ConvertError."""
    source, needed, free = header.path, header.file_bytes, shutil.disk_usage(at.parent).free
    if needed > free:
        raise DiskFull(
            f"{at.parent}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for {header.name}; leave --copy out,"
            " or make room",
            needed,
            free,
        )
    with _disk_errors(at), atomic_write(at) as part:
        copy_of(header.place, part)
        digest = sha256(part)
        if expected not in (None, digest):
            raise BundleError(
                f"{source}: SHA-256 is {digest[:12]}..., expected {str(expected)[:12]}..., its name; it is damaged"
            )
    return digest


def _mended(plan: Repair, target: Path) -> Header:
    """The repaired projector; one that is there already is whole."""
    if not target.exists():
        repair(plan, target)
    header = Header.read(target)
    check_mmproj(header)
    return header


def _fitting(text: Header, place: Path | Part) -> Repair:
    """Raises BundleError for a projector of another model."""
    header = Header.read(place)
    path, kind = header.path, header.keys.get("clip.projector_type")
    if isinstance(kind, str) and kind in OTHERS:
        raise BundleError(f"{path}: the projector of {OTHERS[kind]} ({kind!r}), expected a LLaVA's, 'mlp'")
    try:
        found = examine(place)
    except ConvertError as error:
        raise BundleError(str(error)) from error
    width = text.keys["llama.embedding_length"]
    if found.info.projected_width != width:
        raise BundleError(
            f"{path}: projects to width {found.info.projected_width}, {text.name} has {width}; it belongs to"
            " another model"
        )
    return found


def _best(text: Header, fitting: list[Repair]) -> Repair:
    """That with the most leading words of the text model's name, then by type. Raises InputError for 1.5 and 1.6."""
    shared = [shared_words(text.name, each.header.name) for each in fitting]
    alike = [each for each, words in zip(fitting, shared, strict=True) if words == max(shared)]
    if len({each.info.tiling is None for each in alike}) > 1:
        names = ", ".join(each.header.name for each in alike[:5])
        raise InputError(
            f"{text.path}: found projectors of LLaVA-1.5 and of 1.6 beside it ({names}); name the right one with"
            " --mmproj FILE"
        )
    return min(alike, key=lambda each: (_rank(each.header), each.header.name))


def _rank(header: Header) -> int:
    kind = type_name(header.keys)
    return PROJECTOR_TYPES.index(kind) if kind in PROJECTOR_TYPES else len(PROJECTOR_TYPES)


def shared_words(one: str, other: str) -> int:
    """With how many words two files' names begin alike."""
    words = (_WORD.findall(name.lower()) for name in (one, other))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*words, strict=False)))


def _gguf_files(folder: Path) -> list[Path]:
    """Names that end with .gguf, sorted; nothing for a folder that cannot be read."""
    try:
        names = (path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
        return sorted(path for path in islice(names, MAX_BESIDE) if path.is_file())
    except OSError:
        return []


def _name(model: Path) -> str:
    """What a pair is called: its file's name, of a blob its folder's."""
    return utf8(model.stem if not _HASH.fullmatch(model.name) else model.parent.name) or "model"


def _slug(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip(".-")[:60] or "model"


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConvertError(f"{path}: cannot be written ({error.strerror or error})") from error

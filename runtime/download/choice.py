"""Which files of a repository a model is made from, and under which name the store keeps it.

Knows sources as they are typed and the names that people give to GGUF files; opens nothing, asks nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile

from pocketllava.convert.read.checkpoint import PATTERNS, PICKLED_PATTERNS
from pocketllava.download.hub import HubFile, Listing
from pocketllava.errors import InputError, UnsupportedCheckpoint
from pocketllava.settings import nearest

DEFAULT_TYPE = "Q4_K_M"
PROJECTOR_TYPES = ("F16", "BF16", "Q8_0", "F32", "Q4_0")  # which of several is taken
LONGER = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP16": "F16", "FP32": "F32"}
_PART = r"[A-Za-z0-9][\w.-]*"
_SOURCE = re.compile(
    rf"(?:hf://|(?:https://)?(?:huggingface\.co|hf\.co)/)?(?P<repo>{_PART}/{_PART}?)(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<quant>\w+))?/?"
)
_TYPE = re.compile(r"(?<![a-z0-9])(i?q\d(?:_[a-z0-9]+)*|b?f16|f32|fp16|fp32)(?![a-z0-9])")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_SAFE = re.compile(r"[A-Za-z0-9][\w.-]*")  # a checkpoint's file, as it is named on our disk
_BEFORE, _AFTER = re.compile(r"^ggml[_-]"), re.compile(r"[-_](?:hf|gguf|llamafile)$")


@dataclass(frozen=True)
class Source:
    """A repository on the hub, its revision and the wanted type, as far as they were said."""

    repo: str
    revision: str | None
    quant: str | None


@dataclass(frozen=True)
class Pair:
    """The two GGUF files of a repository."""

    model: HubFile
    mmproj: HubFile

    @property
    def files(self) -> tuple[HubFile, ...]:
        """In the order in which they are downloaded: the small one may be refused."""
        return self.mmproj, self.model


def source(text: str) -> Source:
    """owner/name[@revision][:TYPE], also after hf:// or as the hub's address. Raises InputError."""
    match = _SOURCE.fullmatch(text)
    if match is None:
        raise InputError(
            f"{text}: found no hub id, expected owner/name, hf://owner/name@revision, or owner/name:Q4_K_M; of a"
            " folder on this machine `pocketllava convert` makes a bundle"
        )
    return Source(match["repo"], match["revision"], known_type(match["quant"]) if match["quant"] else None)


def known_type(text: str) -> str:
    """A type's name in its full spelling: "q4_k" is Q4_K_M, as the first files were named."""
    return LONGER.get(text.upper(), text.upper())


def default_name(repo: str) -> str:
    """The store's name for a repository, without a tag: "llava-1.5-7b" for llava-hf/llava-1.5-7b-hf."""
    name = _AFTER.sub("", _BEFORE.sub("", repo.partition("/")[2].lower())).strip("._-")
    return name if len(name) > 1 else "model"


def pair(listing: Listing, quant: str | None, mmproj: str | None) -> Pair | None:
    """The text model and its mmproj, or None for a repository without GGUF files. Raises InputError."""
    files = [file for file in listing.files if file.name.lower().endswith(".gguf")]
    projectors = [file for file in files if is_projector(file)]
    models = [file for file in files if not is_projector(file) and not _SPLIT.search(file.name)]
    if not files:
        return None
    if not models or not projectors:
        lacking = "text model in one .gguf file" if not models else "mmproj file"
        raise InputError(
            f"{listing.repo}: has no {lacking} among {', '.join(f.name for f in files[:5])}; expected a LLaVA as two"
            " GGUF files"
        )
    model = _model(listing.repo, models, quant)
    return Pair(model, _projector(listing.repo, projectors, model, mmproj))


def checkpoint(listing: Listing) -> list[HubFile]:
    """A checkpoint's files, config.json first. Raises UnsupportedCheckpoint for a repository that is none."""
    names = {file.name: file for file in listing.files if _SAFE.fullmatch(file.name)}
    config = names.pop("config.json", None)
    if config is None:
        raise UnsupportedCheckpoint(
            f"{listing.repo}: found neither .gguf files nor a config.json, expected a LLaVA's repository"
        )
    whole = [file for name, file in names.items() if _like(name, PATTERNS)]
    if not any(file.name.endswith(".safetensors") for file in whole):
        whole += [file for name, file in names.items() if _like(name, PICKLED_PATTERNS)]
    return [config, *sorted(whole, key=lambda file: file.bytes)]


def is_projector(file: HubFile) -> bool:
    """Whether a GGUF file is a vision tower, by its path, as llama.cpp tells it."""
    return "mmproj" in file.name.lower()


def type_of(file: HubFile) -> str:
    """The type that a file's name gives; "" for none."""
    types = _TYPE.findall(file.name.rpartition("/")[2].lower())
    return known_type(types[-1]) if types else ""


def _model(repo: str, models: list[HubFile], quant: str | None) -> HubFile:
    """The wanted type, else Q4_K_M, else the first file, as llama.cpp chooses."""
    fitting = [file for file in models if type_of(file) == (quant or DEFAULT_TYPE)]
    if not fitting and quant is not None:
        raise InputError(_no_type(repo, "text model", quant, models))
    return (fitting or models)[0]


def _projector(repo: str, projectors: list[HubFile], model: HubFile, wanted: str | None) -> HubFile:
    """The nearest in the tree; of several F16, Q8_0, Q4_0. Widths are compared once headers are here."""
    near = max(_shared(file, model) for file in projectors)
    files = [file for file in projectors if _shared(file, model) == near]
    if wanted is not None:
        files = [file for file in files if type_of(file) == wanted]
        if not files:
            raise InputError(_no_type(repo, "mmproj", wanted, projectors))
    order = {kind: n for n, kind in enumerate(PROJECTOR_TYPES)}
    return min(files, key=lambda file: order.get(type_of(file), len(order)))


def _shared(file: HubFile, model: HubFile) -> int:
    """How many folders two files have in common."""
    pairs = zip(file.name.split("/")[:-1], model.name.split("/")[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda names: names[0] == names[1], pairs))


def _no_type(repo: str, what: str, wanted: str, files: Iterable[HubFile]) -> str:
    types = sorted({type_of(file) for file in files} - {""})
    return f"{repo}: has no {what} of type {wanted}; there are {', '.join(types) or 'none'}{nearest(wanted, types)}"


def _like(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

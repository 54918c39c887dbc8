"""Bundle -> bundles of other types, from the floats that it holds; nothing else of it changes.

What is exact: a bundle whose type holds the checkpoint's values holds all that there is to know of them, so
that its text model quantizes to the very file that converting the checkpoint gives. F32 bundles always do;
BF16 ones those of BF16 checkpoints, F16 ones those of F16 checkpoints. An F16 bundle of a BF16 checkpoint has
been rounded (and has lost what lies below F16's range) and cannot; nor can a BF16 one of an F16 or F32
checkpoint. The mmproj is copied byte for byte, or re-typed by the same rule (where a BF16 mmproj holds its
patch embedding in F16). Knows GGUF headers and types' mixes; no checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

from pocketllava.convert.plan.file_plan import FilePlan, Key, PlannedTensor
from pocketllava.convert.plan.importance import read_matrix
from pocketllava.convert.plan.mmproj import type_of
from pocketllava.convert.plan.quantize import MMPROJ_TYPES, TEXT_TYPES, UNQUANTIZED, Mix, known
from pocketllava.convert.read.checkpoint import SourceTensor
from pocketllava.convert.write.produce import Job, produce
from pocketllava.convert.write.writer import Progress
from pocketllava.errors import UnsupportedOption
from pocketllava.llamacpp.devices import cores
from pocketllava.models.bundle import Bundle
from pocketllava.models.gguf_header import Header

ARCHITECTURE = "general.architecture"
FILE_TYPE = "general.file_type"


def requantize(
    bundle: str | PathLike[str] | Bundle,
    targets: Mapping[Path, str],
    *,
    mmproj: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> list[Bundle]:
    """Make a bundle of another text type at each target, reading the floats of `bundle` once.

    mmproj: the type to give the vision tower, None to copy it. The rest is as in `convert`. Raises
    UnsupportedOption for a bundle that is quantized already, ConvertError and its kinds.
    """
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    types = {target: known(quant, TEXT_TYPES, "--quant") for target, quant in targets.items()}
    for quant in types.values():
        read_matrix(None, quant)  # refuses the types that need one
    vision = known(mmproj, MMPROJ_TYPES, "--mmproj") if mmproj else None
    jobs = plan_requantize(source, types, vision)
    return produce(jobs, force=force, threads=threads or cores(), progress=progress, resume=resume)


def plan_requantize(bundle: Bundle, types: Mapping[Path, str], mmproj: str | None) -> list[Job]:
    """What is to be made of the bundle; no tensor is read."""
    text, vision = Header.read(bundle.model), Header.read(bundle.mmproj)
    _check_floats(text, "--quant", bundle.manifest["types"]["model"])
    if mmproj:
        _check_floats(vision, "--mmproj", bundle.manifest["types"]["mmproj"])
    vision_plan = _mmproj(vision, mmproj)
    return [
        Job(target, _text(text, quant), vision_plan, _manifest(bundle, quant, mmproj))
        for target, quant in types.items()
    ]


def _check_floats(header: Header, option: str, kind: str) -> None:
    """Refuse what was rounded before: quantizing it again would add one error to another."""
    for tensor in header.tensors.values():
        if tensor.type not in UNQUANTIZED:
            raise UnsupportedOption(
                f"{header.path}: found {kind}, quantized already (tensor {tensor.name} is {T(tensor.type).name}),"
                f" expected F32, F16 or BF16; {option} needs a bundle made with one of them, or the checkpoint"
            )


def _text(header: Header, quant: str) -> FilePlan:
    keys = header.keys
    heads, heads_kv = keys["llama.attention.head_count"], keys["llama.attention.head_count_kv"]
    tied = "output.weight" not in header.tensors
    mix = Mix(quant, keys["llama.block_count"], heads // heads_kv, tied)
    types = {name: mix.type_of(name, info.shape) for name, info in header.tensors.items()}
    return _plan(header, types, int(TEXT_TYPES[quant][1]))


def _mmproj(header: Header, quant: str | None) -> FilePlan:
    if quant is None:
        types = {name: T(info.type) for name, info in header.tensors.items()}
        return _plan(header, types, header.keys[FILE_TYPE])
    types = {name: type_of(name, info.shape, quant) for name, info in header.tensors.items()}
    return _plan(header, types, int(MMPROJ_TYPES[quant][1]))


def _plan(header: Header, types: Mapping[str, T], file_type: int) -> FilePlan:
    tensors = tuple(
        PlannedTensor(info.name, info.shape, types[info.name], _source(header, info.name))
        for info in header.tensors.values()
    )
    keys = tuple(replace(k, value=file_type) if k.name == FILE_TYPE else k for k in keys_of(header))
    return FilePlan(str(header.keys[ARCHITECTURE]), keys, tensors)


def _source(header: Header, name: str) -> SourceTensor:
    info = header.tensors[name]
    offset = header.data_start + info.offset
    return SourceTensor(name, header.path, offset, info.n_bytes, T(info.type).name, info.shape)


def keys_of(header: Header) -> list[Key]:
    """Every key with its type, in order, but for the architecture, which the writer writes itself."""
    keys: list[Key] = []
    for name, value in header.keys.items():
        kind = V(header.key_types[name])
        item = V(header.item_types[name]) if kind is V.ARRAY else None
        if name != ARCHITECTURE:
            keys.append(Key(name, value, kind, item))
    return keys


def _manifest(bundle: Bundle, quant: str, mmproj: str | None) -> dict[str, Any]:
    """All that the bundle says of itself, its new types, and which files the tensors came from."""
    from pocketllava.version import __version__

    before = bundle.manifest
    types = {"model": quant, "mmproj": mmproj or before["types"]["mmproj"]}
    made_from = {
        "types": before["types"],
        "sha256": {name: entry["sha256"] for name, entry in before["files"].items()},
    }
    return {**before, "pocketllava": __version__, "types": types, "files": {}, "quantized_from": made_from}

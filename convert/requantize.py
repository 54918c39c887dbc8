"""Bundle -> bundles of other types, from the floats that it holds; nothing else of it changes.

A bundle whose type can hold the checkpoint's values exactly quantizes to the very file that converting the
checkpoint gives: an F32 bundle always, a BF16 bundle of a BF16 checkpoint, an F16 bundle of an F16 checkpoint. Any
other pair was rounded once (an F16 bundle of a BF16 checkpoint also lost what lies below F16's range). The mmproj is
copied byte for byte, or re-typed by the same rule (a BF16 mmproj holds its patch embedding in F16). Knows GGUF
headers and mixes of types; no checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from gguf import GGMLQuantizationType as T

from pocketllava.convert.plan.file_plan import FilePlan, PlannedTensor
from pocketllava.convert.plan.importance import ImportanceMatrix, read_matrix
from pocketllava.convert.plan.mmproj import type_of
from pocketllava.convert.plan.quantize import MMPROJ_TYPES, TEXT_TYPES, UNQUANTIZED, Mix, known
from pocketllava.convert.read.sources import SourceTensor
from pocketllava.convert.write.produce import Job, Run, produce
from pocketllava.convert.write.writer import Progress
from pocketllava.errors import UnsupportedOption
from pocketllava.llamacpp.devices import cores
from pocketllava.models.bundle import Bundle, Manifest, sha256
from pocketllava.models.file_type import FILE_TYPE
from pocketllava.models.gguf_header import ARCHITECTURE, Header
from pocketllava.models.gguf_writer import stored_keys
from pocketllava.models.manifest import QuantizedFrom, Types
from pocketllava.models.text_contract import TextInfo
from pocketllava.version import __version__


def requantize(
    bundle: str | PathLike[str] | Bundle,
    targets: Mapping[Path, str],
    *,
    mmproj: str | None = None,
    imatrix: str | PathLike[str] | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    worker_command: Sequence[str] | None = None,
) -> list[Bundle]:
    """Make a bundle of another text type at each target, reading the floats of `bundle` once.

    mmproj: the type of the vision tower, None to copy it. The rest is as in `convert`. Raises UnsupportedOption
    for a bundle that is quantized already, BundleError for a damaged one, ConvertError and its kinds.
    """
    source = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    types = {target: known(quant, TEXT_TYPES, "--quant") for target, quant in targets.items()}
    matrix = read_matrix(imatrix, *types.values())
    vision = known(mmproj, MMPROJ_TYPES, "--mmproj") if mmproj else None
    jobs = plan_requantize(source, types, vision, matrix)
    run = Run(
        force=force,
        threads=threads or cores(),
        progress=progress,
        resume=resume,
        worker_command=worker_command,
    )
    return produce(jobs, run)


def plan_requantize(
    bundle: Bundle, types: Mapping[Path, str], mmproj: str | None, matrix: ImportanceMatrix | None = None
) -> list[Job]:
    """Plan a bundle of each type; no tensor is read. Raises BundleError for files that llama.cpp cannot load."""
    text, vision = bundle.model_header, bundle.mmproj_header
    info, _ = bundle.text_info, bundle.mmproj_info
    _check_floats(text, "--quant", bundle.manifest.types.model)
    if mmproj:
        _check_floats(vision, "--mmproj", bundle.manifest.types.mmproj)
    vision_plan = _mmproj(vision, mmproj)
    return [
        Job(target, _text(text, info, quant, matrix), vision_plan, _manifest(bundle, quant, mmproj))
        for target, quant in types.items()
    ]


def _check_floats(header: Header, option: str, kind: str) -> None:
    """Refuse a quantized file: quantizing it again would add one error to another."""
    for tensor in header.tensors.values():
        if tensor.type not in UNQUANTIZED:
            raise UnsupportedOption(
                f"{header.path}: found {kind}, quantized already (tensor {tensor.name} is {T(tensor.type).name}),"
                f" expected F32, F16 or BF16; {option} needs a bundle made with one of them, or the checkpoint"
            )


def _text(header: Header, info: TextInfo, quant: str, matrix: ImportanceMatrix | None) -> FilePlan:
    mix = Mix(quant, info.n_layer, info.n_head // info.n_head_kv, info.tied, matrix is not None)
    types = {name: mix.type_of(name, info.shape) for name, info in header.tensors.items()}
    plan = _plan(header, types, int(TEXT_TYPES[quant][1]))
    if matrix is None:
        return plan
    tensors = tuple(replace(t, importance=matrix.of(t.name, t.shape, t.type)) for t in plan.tensors)
    return replace(plan, keys=(*plan.keys, *matrix.keys()), tensors=tensors)


def _mmproj(header: Header, quant: str | None) -> FilePlan:
    if quant is None:
        types = {name: T(info.type) for name, info in header.tensors.items()}
        return _plan(header, types, header.keys.get(FILE_TYPE))
    types = {name: type_of(name, info.shape, quant) for name, info in header.tensors.items()}
    return _plan(header, types, int(MMPROJ_TYPES[quant][1]))


def _plan(header: Header, types: Mapping[str, T], file_type: int | None) -> FilePlan:
    tensors = tuple(
        PlannedTensor(info.name, info.shape, types[info.name], _source(header, info.name))
        for info in header.tensors.values()
    )
    keys = tuple(replace(k, value=file_type) if k.name == FILE_TYPE else k for k in stored_keys(header))
    return FilePlan(str(header.keys[ARCHITECTURE]), keys, tensors)


def _source(header: Header, name: str) -> SourceTensor:
    info = header.tensors[name]
    offset = header.data_start + info.offset
    return SourceTensor(name, header.path, offset, info.n_bytes, T(info.type).name, info.shape)


def _manifest(bundle: Bundle, quant: str, mmproj: str | None) -> Manifest:
    """The bundle's own manifest with the new types and the files that the tensors came from."""
    source = bundle.manifest
    hashes = {name: record.sha256 or sha256(bundle.path_of(name)) for name, record in source.files.items()}
    types = Types(quant, mmproj or source.types.mmproj)
    return replace(
        source,
        version=__version__,
        types=types,
        files={},
        file_names={},
        references={},
        quantized_from=QuantizedFrom(source.types, hashes),
    )

"""A LLaVA-1.5 mmproj as the hub has it -> one that llama.cpp computes the right features from.

Files made by llama.cpp's first LLaVA scripts (18 or 19 keys, 23 of CLIP ViT-L's 24 blocks) lack what today's
llama.cpp asks for, and it fills in wrong values or refuses them. Knows those files and the mmproj contract;
no engine. Keys and names are written anew, tensor data is copied byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, GGUFWriter
from gguf import GGUFValueType as V

from pocketllava.convert.plan.file_plan import Key
from pocketllava.errors import BundleError, ConvertError
from pocketllava.models.bundle import MANIFEST
from pocketllava.models.files import written_whole
from pocketllava.models.gguf_header import Header, TensorInfo
from pocketllava.models.mmproj_contract import check_mmproj

PREFIX = "clip.vision."
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
CLIP_EPS = 1e-5
CLIP_L_BLOCKS = 24
ALIGNMENT, COPY_BYTES = 32, 1 << 22
NUMBERS = (
    "embedding_length", "feed_forward_length", "block_count", "attention.head_count", "projection_dim",
    "image_size", "patch_size",
)  # fmt: skip
DERIVED = ("GGUF.", "general.architecture", "general.alignment")  # what the writer itself puts there


@dataclass(frozen=True)
class Repair:
    """What is wrong with a file, and what replaces it: keys (in the file's order) and tensors' new names."""

    path: Path
    header: Header
    faults: tuple[str, ...]
    keys: tuple[Key, ...]
    names: dict[str, str]


def find_mmproj(path: Path) -> Path:
    """The mmproj that a file's or folder's path means. Raises ConvertError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConvertError(f"{path}: found nothing, expected an mmproj file or a folder that holds one")
    found = [p for p in sorted(path.glob("*.gguf")) if _is_clip(p) and not p.stem.endswith("-repaired")]
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise ConvertError(
            f"{path}: found {names}, expected one mmproj among its .gguf files; name the file itself"
        )
    return found[0]


def examine(path: Path) -> Repair:
    """Say what has to change. Raises ConvertError for a file that is no LLaVA-1.5 mmproj, or damaged."""
    try:
        header = Header.read(path)
    except BundleError as error:
        raise ConvertError(str(error)) from error
    if (found := header.keys.get("general.architecture")) != "clip":
        raise ConvertError(f"{path}: a GGUF file of architecture {found!r}, expected 'clip', an mmproj")
    keys = {key.name: key for key in _stored_keys(path)}
    faults: list[str] = []
    names = dict(_renamed(header, faults))
    tensors = {names.get(name, name): info for name, info in header.tensors.items()}
    for key, fault in _wrong_keys(header, tensors):
        keys[key.name] = key
        faults.append(fault)
    return Repair(path, header, tuple(faults), tuple(keys.values()), names)


def repair(
    found: Repair, out: Path, *, force: bool = False, look: Callable[[Path], object] | None = None
) -> Path:
    """Write the repaired file beside its final place, check it, then give it its name at once.

    look: called with the checked file while what lay under `out` still does.
    Raises ConvertError; then nothing lies under `out` that did not before.
    """
    if out.exists() and not force:
        raise ConvertError(f"{out}: is there already; use --force to replace it, or another --out")
    if out.is_dir() or (out.parent / MANIFEST).exists():
        raise ConvertError(f"{out}: a folder, or a bundle's file; --out names the file to make")
    try:
        with written_whole(out) as part:
            written = _write(found, part)
            _check(found, part, written)
            if look is not None:
                look(part)
        out.chmod(found.path.stat().st_mode)
    except OSError as error:
        raise ConvertError(f"{out}: cannot be written ({error.strerror or error})") from error
    return out


def _is_clip(path: Path) -> bool:
    try:
        return Header.read(path).keys.get("general.architecture") == "clip"
    except BundleError:
        return False


def _stored_keys(path: Path) -> Iterator[Key]:
    """Every key with its exact types; the header was checked before, but gguf is stricter about texts."""
    try:
        for field in GGUFReader(path).fields.values():
            if not field.name.startswith(DERIVED):
                item = field.types[-1] if field.types[0] is V.ARRAY else None
                yield Key(field.name, field.contents(), field.types[0], item)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ConvertError(f"{path}: its keys cannot be read ({error}); download it again") from error


def _renamed(header: Header, faults: list[str]) -> Iterator[tuple[str, str]]:
    """Old names: fc1 and fc2 swapped, as the first scripts wrote them, and a projector counted mm.1, mm.2."""
    up, width = header.tensors.get("v.blk.0.ffn_up.weight"), header.keys.get(PREFIX + "embedding_length")
    if up is not None and len(up.shape) == 2 and up.shape[0] == width != up.shape[1]:
        faults.append("ffn_up and ffn_down are each other's names: swapped")
        for name in header.tensors:
            if ".ffn_up." in name:
                yield name, name.replace(".ffn_up.", ".ffn_down.")
            elif ".ffn_down." in name:
                yield name, name.replace(".ffn_down.", ".ffn_up.")
    if "mm.0.weight" not in header.tensors and {"mm.1.weight", "mm.2.weight"} <= set(header.tensors):
        faults.append("the projector's layers are called mm.1 and mm.2, expected mm.0 and mm.2: renamed")
        for kind in ("weight", "bias"):
            yield f"mm.1.{kind}", f"mm.0.{kind}"


def _wrong_keys(header: Header, tensors: dict[str, TensorInfo]) -> Iterator[tuple[Key, str]]:
    keys = header.keys

    def missing(name: str, value: Any, kind: V, item: V | None, effect: str) -> Iterator[tuple[Key, str]]:
        if name not in keys:
            yield Key(name, value, kind, item), f"{name} is missing, {effect}: now {value!r}"

    yield from missing("clip.has_vision_encoder", True, V.BOOL, None, "so llama.cpp sees no vision tower")
    projector = keys.get(PREFIX + "projector_type", "mlp")
    if "mm.3.weight" in tensors or "mm.2.weight" not in tensors or projector != "mlp":
        raise ConvertError(
            f"{header.path}: projector {projector!r} with {sum(n.startswith('mm.') for n in tensors)} tensors,"
            " expected LLaVA-1.5's two layers mm.0 and mm.2; it belongs to another kind of model"
        )
    yield from missing("clip.projector_type", "mlp", V.STRING, None, "so llama.cpp refuses the file")
    effect = "so llama.cpp refuses the file"
    yield from missing(PREFIX + "image_mean", CLIP_MEAN, V.ARRAY, V.FLOAT32, effect)
    yield from missing(PREFIX + "image_std", CLIP_STD, V.ARRAY, V.FLOAT32, effect)
    yield from missing(PREFIX + "attention.layer_norm_epsilon", CLIP_EPS, V.FLOAT32, None, effect)
    yield from _wrong_numbers(header, tensors)
    yield from _missing_depth(header)


def _wrong_numbers(header: Header, tensors: dict[str, TensorInfo]) -> Iterator[tuple[Key, str]]:
    """projection_dim was CLIP's own, 768; and numbers of another integer type end llama.cpp's process."""
    for short in NUMBERS:
        name = PREFIX + short
        value, kind = header.keys.get(name), header.key_types.get(name)
        right = tensors["mm.2.weight"].shape[0] if short == "projection_dim" else value
        if not isinstance(right, int) or isinstance(right, bool) or not 0 < right < 1 << 31:
            continue  # check_mmproj says what is wrong with it
        if value != right or kind != V.UINT32:
            said = f"is {value!r}" if value != right else f"is of type {V(kind).name}, not UINT32"
            yield Key(name, right, V.UINT32), f"{name} {said}: now {right}"


def _missing_depth(header: Header) -> Iterator[tuple[Key, str]]:
    """Without feature_layer all stored blocks but the last run; files cut to the blocks needed have no such one.

    A tower stored whole, with 24 blocks or its last norm, is read rightly without the key.
    """
    n, name = header.keys.get(PREFIX + "block_count"), PREFIX + "feature_layer"
    whole = n == CLIP_L_BLOCKS or any(t.startswith("v.post_ln.") for t in header.tensors)
    if name not in header.keys and isinstance(n, int) and not whole:
        fault = f"{name} is missing, so llama.cpp runs {n - 1} of the {n} blocks: now [{n}]"
        yield Key(name, [n], V.ARRAY, V.INT32), fault


def _write(found: Repair, path: Path) -> dict[str, str]:
    """Header anew, then every tensor's bytes in the source's order; SHA-256 of what was read, by new name."""
    infos = sorted(found.header.tensors.values(), key=lambda t: t.offset)
    writer = GGUFWriter(path, "clip")
    for key in found.keys:
        writer.add_key_value(key.name, key.value, key.kind, sub_type=key.item)
    for info in infos:  # the numpy type is ignored where raw_dtype names the type
        name, kind = found.names.get(info.name, info.name), T(info.type)
        writer.add_tensor_info(name, info.shape, np.dtype(np.float32), info.n_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file: Any = writer.fout[0]
    digests: dict[str, str] = {}
    try:
        with found.path.open("rb") as source:
            for info in infos:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                source.seek(found.header.data_start + info.offset)
                digests[found.names.get(info.name, info.name)] = _copy(source, info.n_bytes, file)
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
    finally:
        file.close()
    return digests


def _copy(source: BinaryIO, n_bytes: int, target: BinaryIO | None = None) -> str:
    """SHA-256 of the next n_bytes, written to the target on the way."""
    digest = hashlib.sha256()
    while n_bytes:
        if not (data := source.read(min(n_bytes, COPY_BYTES))):
            raise ConvertError(f"{source.name}: ends inside a tensor; it changed while being read")
        digest.update(data)
        if target is not None:
            target.write(data)
        n_bytes -= len(data)
    return digest.hexdigest()


def _check(found: Repair, work: Path, written: dict[str, str]) -> None:
    """Read the new file back: the whole contract, and every tensor's hash."""
    try:
        header = Header.read(work)
        check_mmproj(header)
    except BundleError as error:
        said = str(error).replace(str(work), str(found.path))
        raise ConvertError(f"{said} (a repair does not help)") from error
    with work.open("rb") as file:
        for info in header.tensors.values():
            file.seek(header.data_start + info.offset)
            if _copy(file, info.n_bytes) != written[info.name]:
                raise ConvertError(f"{work}: tensor {info.name} did not reach the disk unchanged; try again")

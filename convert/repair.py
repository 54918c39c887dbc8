"""A published LLaVA-1.5 or 1.6 mmproj -> one from which llama.cpp computes the right features.

Files made by llama.cpp's first LLaVA scripts (18 or 19 keys, 23 of CLIP ViT-L's 24 blocks) lack keys that today's
llama.cpp needs: it assumes wrong values or refuses the file. Knows those files and the mmproj contract; no engine.
Keys and names are rewritten, tensor data is copied byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGUFValueType as V

from pocketllava.errors import BundleError, ConvertError
from pocketllava.models.bundle import MANIFEST, Manifest
from pocketllava.models.contract import check_layout, shown
from pocketllava.models.files import locked_write
from pocketllava.models.gguf_header import ARCHITECTURE, Header, Part, TensorInfo, architecture
from pocketllava.models.gguf_writer import Key, header_bytes, padding, stored_keys
from pocketllava.models.mmproj_contract import NEWLINES, PREFIX, MmprojInfo, check_mmproj
from pocketllava.models.preprocessing import CLIP_MEAN, CLIP_STD

CLIP_EPS = 1e-5
CLIP_L_BLOCKS = 24
COPY_BYTES = 1 << 22
NUMBERS = (
    "embedding_length", "feed_forward_length", "block_count", "attention.head_count", "projection_dim",
    "image_size", "patch_size",
)  # fmt: skip


@dataclass(frozen=True)
class Repair:
    """A file's faults and their repair: all keys in the file's order, and tensors' new names by old name."""

    header: Header
    faults: tuple[str, ...]
    keys: tuple[Key, ...]
    names: dict[str, str]
    info: MmprojInfo

    @property
    def path(self) -> Path:
        """The file before its repair."""
        return self.header.path


def find_mmproj(path: Path) -> Path:
    """The file itself, or the one mmproj in a folder. Raises ConvertError."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConvertError(f"{path}: found nothing, expected an mmproj file or a folder that holds one")
    files = [
        p
        for p in sorted(path.glob("*.gguf"))
        if architecture(p) == "clip" and not p.stem.endswith("-repaired")
    ]
    if len(files) != 1:
        names = ", ".join(p.name for p in files) or "none"
        raise ConvertError(
            f"{path}: found {names}, expected one mmproj among its .gguf files; name the file itself"
        )
    return files[0]


def examine(place: Path | Part) -> Repair:
    """Find a file's faults. Raises ConvertError for one that is no LLaVA mmproj, or damaged beyond repair."""
    try:
        return _examine(Header.read(place))
    except BundleError as error:
        raise ConvertError(f"{error} (a repair does not help)") from error


def _examine(header: Header) -> Repair:
    if (kind := header.keys.get(ARCHITECTURE)) != "clip":
        raise ConvertError(
            f"{header.path}: a GGUF file of architecture {shown(kind)}, expected 'clip', an mmproj"
        )
    keys = {key.name: key for key in stored_keys(header)}
    faults: list[str] = []
    names = dict(_renamed(header, faults))
    tensors = {names.get(name, name): info for name, info in header.tensors.items()}
    for key, fault in _wrong_keys(header, tensors):
        keys[key.name] = key
        faults.append(fault)
    return _plan(header, tuple(keys.values()), names, tuple(faults))


def repair(
    plan: Repair, out: Path, *, force: bool = False, look: Callable[[Path], object] | None = None
) -> Path:
    """Write the repaired file beside its final path, check it, then rename it.

    look: called with the checked file while an older file under `out` is still there.
    Raises ConvertError; then `out` is as it was.
    """
    if out.exists() and not force:
        raise ConvertError(f"{out}: is there already; use --force to replace it, or another --out")
    if out.is_dir() or in_bundle(out):
        raise ConvertError(f"{out}: a folder, or a bundle's file; --out names the file to make")
    try:
        mode = plan.path.stat().st_mode & (0o666 if plan.header.part else ~0)  # a llamafile is a program
        with locked_write(out) as part:
            digests = _write(plan, part)
            _check(plan, part, digests)
            if look is not None:
                look(part)
        out.chmod(mode)
    except OSError as error:
        raise ConvertError(f"{out}: cannot be written ({error.strerror or error})") from error
    return out


def in_bundle(out: Path) -> bool:
    """Whether a converted bundle is there, whose files are recorded; a pair's bundle.json can be written again."""
    if not (out.parent / MANIFEST).exists():
        return False
    try:
        return not Manifest.read(out.parent / MANIFEST).file_names
    except BundleError:
        return True


def _renamed(header: Header, faults: list[str]) -> Iterator[tuple[str, str]]:
    """(old, new) names: the first scripts swapped fc1 and fc2, and others number the projector mm.1, mm.2;
    LLaVA-1.6's newline embedding."""
    up, width = header.tensors.get("v.blk.0.ffn_up.weight"), header.keys.get(PREFIX + "embedding_length")
    if up is not None and len(up.shape) == 2 and up.shape[0] == width != up.shape[1]:
        faults.append("ffn_up and ffn_down have each other's names: swapped")
        for name in header.tensors:
            if ".ffn_up." in name:
                yield name, name.replace(".ffn_up.", ".ffn_down.")
            elif ".ffn_down." in name:
                yield name, name.replace(".ffn_down.", ".ffn_up.")
    if "mm.0.weight" not in header.tensors and {"mm.1.weight", "mm.2.weight"} <= set(header.tensors):
        faults.append("the projector's layers are called mm.1 and mm.2, expected mm.0 and mm.2: renamed")
        for kind in ("weight", "bias"):
            yield f"mm.1.{kind}", f"mm.0.{kind}"
    newline, old_newline = NEWLINES
    if old_newline in header.tensors and newline not in header.tensors:
        faults.append(
            f"the tensor {newline} has the name of llama.cpp's first script, {old_newline}: renamed"
        )
        yield old_newline, newline


def _wrong_keys(header: Header, tensors: dict[str, TensorInfo]) -> Iterator[tuple[Key, str]]:
    keys = header.keys

    def missing(name: str, value: Any, kind: V, item: V | None, effect: str) -> Iterator[tuple[Key, str]]:
        if name not in keys:
            yield Key(name, value, kind, item), f"{name} is missing, {effect}: now {value!r}"

    yield from missing("clip.has_vision_encoder", True, V.BOOL, None, "so llama.cpp sees no vision tower")
    projector = keys.get("clip.projector_type", keys.get(PREFIX + "projector_type", "mlp"))
    if projector == "mlp" and not any(name.startswith("mm.") for name in tensors):
        raise ConvertError(
            f"{header.path}: a vision tower without a projector, expected LLaVA's two layers mm.0 and mm.2 behind it;"
            " it was converted without its projector's file"
        )
    if "mm.3.weight" in tensors or "mm.2.weight" not in tensors or projector != "mlp":
        raise ConvertError(
            f"{header.path}: projector {projector!r} with {sum(n.startswith('mm.') for n in tensors)} tensors,"
            " expected LLaVA's two layers mm.0 and mm.2; it belongs to another kind of model"
        )
    yield from missing("clip.projector_type", "mlp", V.STRING, None, "so llama.cpp refuses the file")
    effect = "so llama.cpp refuses the file"
    yield from missing(PREFIX + "image_mean", list(CLIP_MEAN), V.ARRAY, V.FLOAT32, effect)
    yield from missing(PREFIX + "image_std", list(CLIP_STD), V.ARRAY, V.FLOAT32, effect)
    yield from missing(PREFIX + "attention.layer_norm_epsilon", CLIP_EPS, V.FLOAT32, None, effect)
    yield from _wrong_numbers(header, tensors)
    yield from _missing_depth(header)


def _wrong_numbers(header: Header, tensors: dict[str, TensorInfo]) -> Iterator[tuple[Key, str]]:
    """CLIP's own projection_dim, 768, and numbers of another integer type, on which llama.cpp aborts."""
    for short in NUMBERS:
        name = PREFIX + short
        value, kind = header.keys.get(name), header.key_types.get(name)
        right = tensors["mm.2.weight"].shape[0] if short == "projection_dim" else value
        if not isinstance(right, int) or isinstance(right, bool) or not 0 < right < 1 << 31:
            continue  # check_mmproj says what is wrong with it
        if value != right or kind != V.UINT32:
            fault = f"is {value!r}" if value != right else f"is of type {V(kind).name}, not UINT32"
            yield Key(name, right, V.UINT32), f"{name} {fault}: now {right}"


def _missing_depth(header: Header) -> Iterator[tuple[Key, str]]:
    """Without feature_layer llama.cpp skips the last block, which a file cut to the needed blocks must not lose.

    A complete tower, with 24 blocks or its last norm, is right without the key.
    """
    n, name = header.keys.get(PREFIX + "block_count"), PREFIX + "feature_layer"
    complete = n == CLIP_L_BLOCKS or any(t.startswith("v.post_ln.") for t in header.tensors)
    if name not in header.keys and isinstance(n, int) and not complete:
        fault = f"{name} is missing, so llama.cpp runs {n - 1} of the {n} blocks: now [{n}]"
        yield Key(name, [n], V.ARRAY, V.INT32), fault


def _plan(header: Header, keys: tuple[Key, ...], names: dict[str, str], faults: tuple[str, ...]) -> Repair:
    """The repair, with the header that it will give checked before anything is copied. Raises BundleError."""
    check_layout(header)
    tensors, end = {}, 0
    for info in header.tensors.values():
        name = names.get(info.name, info.name)
        tensors[name] = replace(info, name=name, offset=end)
        end += info.n_bytes + len(padding(info.n_bytes))
    own = (Key(ARCHITECTURE, header.keys[ARCHITECTURE], V(header.key_types[ARCHITECTURE])), *keys)
    repaired = replace(
        header,
        keys={key.name: key.value for key in own},
        key_types={key.name: int(key.kind) for key in own},
        item_types={key.name: int(key.item) for key in own if key.item is not None},
        tensors=tensors,
    )
    return Repair(header, faults, keys, names, check_mmproj(repaired))


def _write(plan: Repair, path: Path) -> dict[str, str]:
    """A new header, then every tensor's bytes in the source's order; SHA-256 of each as read, by new name."""
    infos = [
        replace(info, name=plan.names.get(info.name, info.name)) for info in plan.header.tensors.values()
    ]
    digests: dict[str, str] = {}
    with path.open("wb") as file, plan.path.open("rb") as source:
        file.write(header_bytes("clip", plan.keys, infos))
        for info in infos:
            source.seek(plan.header.data_start + info.offset)
            digests[info.name] = _copy(source, info.n_bytes, file)
            file.write(padding(info.n_bytes))
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


def _check(plan: Repair, path: Path, digests: dict[str, str]) -> None:
    """Read the new file back: the mmproj contract, and every tensor's hash."""
    try:
        header = Header.read(path)
        check_mmproj(header)
    except BundleError as error:
        fault = str(error).replace(str(path), str(plan.path))
        raise ConvertError(f"{fault} (a repair does not help)") from error
    with path.open("rb") as file:
        for info in header.tensors.values():
            file.seek(header.data_start + info.offset)
            if _copy(file, info.n_bytes) != digests[info.name]:
                raise ConvertError(f"{path}: tensor {info.name} did not reach the disk unchanged; try again")

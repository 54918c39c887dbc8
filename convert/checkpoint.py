"""A folder or hub id -> JSON files and a table of tensors under canonical names.

Knows safetensors headers and the three ways a LLaVA-1.5 checkpoint names its tensors; reads no tensor
data and knows no GGUF. Canonical names are `text.*`, `vision.*` and `projector.*`:
text.layers.0.self_attn.q_proj.weight, vision.encoder.layers.0.mlp.fc1.bias, projector.linear_1.weight.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllava.errors import ConvertError, TensorMismatch, UnsupportedCheckpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
WIDTHS |= {"F8_E4M3": 1, "F8_E5M2": 1}
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class SourceTensor:
    """Where one tensor's bytes lie. `shape` is rows first; `dtype` is safetensors' code.

    computed: the bytes themselves, for a tensor that follows from config.json and lies in no file.
    """

    name: str
    file: Path
    offset: int
    n_bytes: int
    dtype: str
    shape: tuple[int, ...]
    computed: bytes | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: `files` is JSON content by file name, `tensors` by canonical name."""

    folder: Path
    identity: dict[str, Any]
    files: dict[str, Any]
    chat_template: str | None
    tensors: dict[str, SourceTensor]
    dropped: dict[str, str]

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return dict(self.files["config.json"])


def fetch(source: str, revision: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The folder that holds SOURCE, downloaded from the hub if need be, and what identifies it.

    Downloads resume, land in huggingface_hub's cache, and honour HF_HUB_OFFLINE. Raises ConvertError.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, {"id": folder.resolve().name, "revision": None}
    if folder.exists() or not HUB_ID.match(source):
        found = "a file" if folder.exists() else "nothing"
        raise ConvertError(
            f"{source}: found {found}, expected a checkpoint's folder or a hub id like owner/name"
        )
    return _download(source, revision)


def _download(source: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(source, revision=revision, allow_patterns=PATTERNS, ignore_patterns=["*/*"])
        )
    except Exception as error:  # network, hub and file errors share no base class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConvertError(
            f"{source}: no such folder, and the hub gave nothing ({reason}); check the name and the network,"
            " or give a folder"
        ) from error
    return folder, {"id": source, "revision": folder.name}


def open_checkpoint(folder: Path, identity: dict[str, Any]) -> Checkpoint:
    """Read and check the JSON files and every tensor's header. Raises ConvertError and its kinds."""
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedCheckpoint(
            f"{folder}: a LoRA adapter; merge it into its base model and convert that"
        )
    if not (folder / "config.json").is_file():
        raise ConvertError(
            f"{folder}: no config.json, expected a LLaVA-1.5 checkpoint in the Hugging Face layout"
        )
    files = {path.name: _json(path) for path in sorted(folder.glob("*.json")) if path.name != INDEX}
    tensors: dict[str, SourceTensor] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    for path in _weight_files(folder):
        for tensor in read_safetensors(path):
            name = canonical(tensor.name)
            if name is None:
                unknown.append(tensor.name)
            elif name.endswith((".position_ids", ".rotary_emb.inv_freq")):
                dropped[tensor.name] = "a constant that the runtime computes"
            elif name in tensors:
                raise TensorMismatch(f"{path.name}: tensor {tensor.name!r} stands for {name} a second time")
            else:
                tensors[name] = tensor
    if unknown:
        raise TensorMismatch(
            f"{folder}: {len(unknown)} unexpected tensors, first {unknown[0]!r}; expected the names of"
            " LlavaForConditionalGeneration",
            unexpected=tuple(unknown),
        )
    return Checkpoint(folder, identity, files, _chat_template(folder, files), tensors, dropped)


def canonical(name: str) -> str | None:
    """The canonical name of a checkpoint's tensor, or None for one that belongs to no part.

    Accepts the hub's names, those of transformers >= 4.52 and >= 5.6, and saves that repeat
    `language_model.` (transformers 5.4): what follows the last one counts.
    """
    name = name.removeprefix("model.")
    if (at := name.rfind("multi_modal_projector.")) >= 0:
        return "projector." + name[at + len("multi_modal_projector.") :]
    if name.startswith("vision_tower."):
        return "vision." + name.removeprefix("vision_tower.").removeprefix("vision_model.")
    if (at := name.rfind("language_model.")) >= 0:
        return "text." + name[at + len("language_model.") :].removeprefix("model.")
    return "text." + name if name.startswith("lm_head.") else None


def read_safetensors(path: Path) -> list[SourceTensor]:
    """The tensors of one file, every offset checked against the file's size.

    Format: an 8-byte little-endian header length, a JSON header, tensor data
    (https://huggingface.co/docs/safetensors). Raises ConvertError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head == LFS[:8]:
            raise _pointer(path)
        length = int.from_bytes(head, "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ConvertError(f"{path}: {size} bytes, not a whole safetensors file; download it again")
        header = _parse(file.read(length), path)
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = [_tensor(path, name, entry, start, size) for name, entry in header.items()]
    end = start
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.offset < end:
            raise ConvertError(
                f"{path}: tensor {tensor.name!r} overlaps the one before it; download it again"
            )
        end = tensor.offset + tensor.n_bytes
    return tensors


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> SourceTensor:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = isinstance(dtype, str) and all(
            type(n) is int and 0 <= n < 1 << 40 for n in (*shape, first, last)
        )
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ConvertError(f"{path}: tensor {name!r} has a damaged header entry; download the file again")
    n_bytes = WIDTHS.get(dtype, 0)
    for n in shape:
        n_bytes *= n
    if dtype in WIDTHS and last - first != n_bytes:
        raise ConvertError(
            f"{path}: tensor {name!r} takes {last - first} bytes, expected {n_bytes} for {dtype} {list(shape)}"
        )
    if first > last or start + last > size:
        raise ConvertError(
            f"{path}: {size} bytes, but tensor {name!r} ends at {start + last}; the file is truncated:"
            " download it again"
        )
    return SourceTensor(name, path, start + first, last - first, dtype, shape)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return _shards(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    found = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.safetensors")
    )
    raise ConvertError(
        f"{folder}: no {WEIGHTS} and no {INDEX}"
        + (f" (found {found[0]})" if found else "")
        + "; pocketllava converts safetensors checkpoints"
    )


def _shards(folder: Path) -> list[Path]:
    weight_map = _json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConvertError(f"{folder / INDEX}: no weight_map, expected the shard of every tensor")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ConvertError(f"{folder}: shard {name!r} is missing, though {INDEX} names it; download it")
    held = {t.name for name in names for t in read_safetensors(folder / name)}
    if absent := sorted(set(weight_map) - held):
        raise TensorMismatch(
            f"{folder}: {INDEX} names {absent[0]!r}, which no shard holds ({len(absent)} such tensors)",
            missing=tuple(absent),
        )
    return [folder / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    return _parse(path.read_bytes(), path)


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    if data.startswith(LFS):
        raise _pointer(path)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConvertError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def _pointer(path: Path) -> ConvertError:
    return ConvertError(f"{path}: a git-lfs pointer, not the file; run `git lfs pull` or download it")


def _chat_template(folder: Path, files: dict[str, Any]) -> str | None:
    """The processor's chat template, wherever this version of transformers keeps it."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = files.get(name, {}).get("chat_template")
        if isinstance(template, str):
            return template
    return None

"""A folder or hub id -> JSON files and a table of tensors under canonical names.

Knows a checkpoint's files and the ways in which LLaVA checkpoints name their tensors; shards.py reads weight
files. Reads no tensor data and knows no GGUF. Canonical names are `text.*`, `vision.*` and `projector.*`:
text.layers.0.self_attn.q_proj.weight, vision.encoder.layers.0.mlp.fc1.bias, projector.linear_1.weight.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketllava.convert.read import original
from pocketllava.convert.read.shards import FORMATS, SAFETENSORS, has_weights, read_tensors
from pocketllava.convert.read.sources import SourceTensor, read_bytes, read_json
from pocketllava.errors import ConvertError, TensorMismatch, UnsupportedCheckpoint
from pocketllava.models.files import expanded, utf8

logger = logging.getLogger("pocketllava")
# Other JSON files in a folder are other programs': never read, whatever they hold.
JSON_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "chat_template.json",
)  # fmt: skip
JINJA_FILES = ("chat_template.jinja", "additional_chat_templates/default.jinja")
PATTERNS = [*JSON_FILES, *(f.index for f in FORMATS), "*.safetensors", "tokenizer.model", "*.jinja"]
PICKLED_PATTERNS = ["pytorch_model*.bin"]
UNINDEXED = "belongs to no part of the model, and the index does not name it"
MAX_TEMPLATE_BYTES = 1 << 20
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: `files` is JSON content by file name, `tensors` by canonical name.

    original: the unchanged config.json of a checkpoint in the original authors' format. chat_template: the
    checkpoint's own, if it has one. remarks: a line about each oddity that a conversion copes with.
    """

    folder: Path
    identity: dict[str, Any]
    files: dict[str, Any]
    chat_template: str | None
    tensors: dict[str, SourceTensor]
    dropped: dict[str, str]
    original: dict[str, Any] | None = None
    remarks: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """config.json with the hub's keys."""
        return dict(self.files["config.json"])


def fetch(source: str, revision: str | None = None, weights: bool = True) -> tuple[Path, dict[str, Any]]:
    """(SOURCE's folder, downloaded from the hub if need be; its id and commit).

    Downloads resume, land in huggingface_hub's cache, and honor HF_HUB_OFFLINE. Raises ConvertError.
    """
    folder = expanded(source)
    if folder.is_dir():
        return folder, {"id": utf8(folder.resolve().name), "revision": None}
    if folder.exists() or not HUB_ID.match(source):
        state = "a file" if folder.exists() else "nothing"
        raise ConvertError(
            f"{source}: found {state}, expected a checkpoint's folder or a hub id like owner/name"
        )
    return _download(source, revision, weights)


def _download(source: str, revision: str | None, weights: bool) -> tuple[Path, dict[str, Any]]:
    try:
        folder = _snapshot(source, revision, PATTERNS if weights else list(JSON_FILES))
        if weights and not has_weights(folder, (SAFETENSORS,)):
            folder = _snapshot(source, folder.name, PICKLED_PATTERNS)
    except ModuleNotFoundError as error:
        raise ConvertError(
            f'{source}: no such folder, and asking the hub needs {error.name}; pip install "pocketllava[convert]"'
        ) from error
    except Exception as error:  # network, hub and file errors share no base class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConvertError(
            f"{source}: no such folder, and the hub gave nothing ({reason}); check the name and the network,"
            " or give a folder"
        ) from error
    return folder, {"id": source, "revision": folder.name}


def _snapshot(source: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
    )


def open_checkpoint(folder: Path, identity: dict[str, Any], vision_tower: str | None = None) -> Checkpoint:
    """Read and check the JSON files and every tensor's header. Raises ConvertError and its kinds.

    vision_tower: folder or hub id of the CLIP model for a checkpoint of the original format.
    """
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedCheckpoint(
            f"{folder}: a LoRA adapter; merge it into its base model and convert that"
        )
    if not (folder / "config.json").is_file():
        raise ConvertError(f"{folder}: no config.json, expected a LLaVA checkpoint")
    files = {name: read_json(folder / name) for name in JSON_FILES if (folder / name).is_file()}
    template, sources = _chat_template(folder, files)
    remarks = [f"chat template: {sources[0]}'s; ignored: {', '.join(sources[1:])}"] if sources[1:] else []
    kind = original.text_kind(files["config.json"])
    if kind is None:
        if vision_tower is not None:
            raise ConvertError(f"{folder}: holds its vision tower itself; leave --vision-tower out")
        weights = read_tensors(folder)
        tensors, dropped = _named(weights.tensors, canonical, folder)
        remarks += weights.remarks
        return Checkpoint(folder, identity, files, template, tensors, dropped, remarks=tuple(remarks))
    config = files["config.json"]
    original.hub_config(config, None)  # refuses what cannot be converted, before a tower is fetched
    weights = read_tensors(folder)
    tensors, dropped = _named(weights.tensors, original.canonical, folder)
    vision = _original_tower(folder, config, vision_tower, tensors, dropped, files)
    files["config.json"] = original.hub_config(config, vision)
    remarks += weights.remarks
    return Checkpoint(folder, identity, files, template, tensors, dropped, config, tuple(remarks))


def _original_tower(
    checkpoint: Path,
    config: dict[str, Any],
    given: str | None,
    tensors: dict[str, SourceTensor],
    dropped: dict[str, str],
    files: dict[str, Any],
) -> dict[str, Any] | None:
    """The vision tower's config; adds its tensors and preprocessing to those of a checkpoint that has none."""
    inside = [name for name in tensors if name.startswith("vision.")]
    source = original.tower_source(config, checkpoint, given)
    if inside and source == original.HUB_OWNER + original.KNOWN_TOWER and given is None:
        return None
    try:
        if given is None and not Path(source).is_absolute():  # a hub id, whatever lies in the current folder
            logger.warning("config.json names the vision tower %s: reading it from the hub", source)
            folder, _ = _download(source, None, weights=not inside)
        else:
            folder, _ = fetch(source, weights=not inside or given is not None)
    except ConvertError as error:
        raise ConvertError(f"vision tower {error}; --vision-tower FOLDER names another") from error
    vision = original.tower_config(folder)
    if (path := folder / "preprocessor_config.json").is_file():
        files.setdefault(path.name, read_json(path))
    if given is not None or not inside:
        dropped |= {tensors.pop(n).name: "replaced by --vision-tower" for n in inside}
        tower, unused = original.tower_tensors(folder)
        tensors |= tower
        dropped |= unused
    return vision


def _named(
    sources: Iterable[SourceTensor], name_of: Callable[[str], str | None], folder: Path
) -> tuple[dict[str, SourceTensor], dict[str, str]]:
    """(tensors by canonical name, reasons by the name of a tensor left out). Raises TensorMismatch."""
    tensors: dict[str, SourceTensor] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    for tensor in sources:
        name = name_of(tensor.name)
        if name is None and not tensor.indexed:
            dropped[tensor.name] = UNINDEXED
        elif name is None:
            unknown.append(tensor.name)
        elif name.endswith((".position_ids", ".rotary_emb.inv_freq")):
            dropped[tensor.name] = "a constant that the runtime computes"
        elif name in tensors:
            raise TensorMismatch(
                f"{tensor.file.name}: tensor {tensor.name!r} stands for {name} a second time"
            )
        else:
            tensors[name] = tensor
    if unknown:
        raise TensorMismatch(
            f"{folder}: {len(unknown)} unexpected tensors, first {unknown[0]!r}; expected the names of a LLaVA"
            " checkpoint",
            unexpected=tuple(unknown),
        )
    return tensors, dropped


def canonical(name: str) -> str | None:
    """The canonical name of a checkpoint's tensor, or None for one that belongs to no part.

    Accepts the hub's names, those of transformers >= 4.52 and >= 5.6, and files that repeat `language_model.`
    (transformers 5.4): the rest after the last one counts.
    """
    name = name.removeprefix("model.")
    if name == "image_newline":
        return "projector.image_newline"
    if (at := name.rfind("multi_modal_projector.")) >= 0:
        return "projector." + name[at + len("multi_modal_projector.") :]
    if name.startswith("vision_tower."):
        return "vision." + name.removeprefix("vision_tower.").removeprefix("vision_model.")
    if (at := name.rfind("language_model.")) >= 0:
        return "text." + name[at + len("language_model.") :].removeprefix("model.")
    return "text." + name if name.startswith("lm_head.") else None


def _chat_template(folder: Path, files: dict[str, Any]) -> tuple[str | None, list[str]]:
    """(the checkpoint's chat template, every file that has one), the file that counts first.

    The order is that of transformers 5.24's processor (processing_utils.py, get_processor_dict); tokenizer_config.json
    comes last, which older processors fell back to.
    """
    jinja = {
        name: read_bytes(folder / name, MAX_TEMPLATE_BYTES).decode()
        for name in JINJA_FILES
        if (folder / name).is_file()
    }
    json_files = ("processor_config.json", "chat_template.json", "tokenizer_config.json")
    described = {name: files.get(name, {}).get("chat_template") for name in json_files}
    last = described.pop("tokenizer_config.json")
    templates = {
        name: template
        for name, value in {**described, **jinja, "tokenizer_config.json": last}.items()
        if (template := _default_template(value)) is not None
    }
    return next(iter(templates.values()), None), list(templates)


def _default_template(value: Any) -> str | None:
    """The template itself, or the one called "default" of several: {name: template} or [{name, template}]."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None

"""A bundle: a folder with model.gguf, mmproj.gguf and bundle.json, and the checks that it is whole.

Knows the manifest and file headers; no tensors, no engine. A bundle is whole when both files have the
size and the header that bundle.json recorded after they were verified.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from pocketllava.errors import BundleError, ModelNotFound
from pocketllava.models.gguf_header import Header
from pocketllava.models.preprocessing import Preprocessing

MANIFEST, MODEL, MMPROJ = "bundle.json", "model.gguf", "mmproj.gguf"
FORMAT = 1
CHUNK_BYTES = 1 << 22

# What the processor of llava-hf/llava-1.5-7b-hf renders; used where a checkpoint brings no template.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `manifest` is bundle.json's content."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Bundle:
        """Open a bundle's folder and check both files' sizes and headers (milliseconds).

        Raises ModelNotFound when there is no bundle, BundleError when a file is missing or changed.
        """
        folder = Path(path)
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            raise ModelNotFound(
                f"{folder}: found {found}, expected a folder made by `pocketllava convert`{_nearest(folder)}"
            )
        if not (folder / MANIFEST).is_file():
            raise ModelNotFound(f"{folder}: no {MANIFEST}{_what_lies_there(folder)}")
        bundle = cls(folder, _read_manifest(folder / MANIFEST))
        for name in (MODEL, MMPROJ):
            bundle._check_file(name)
        return bundle

    @classmethod
    def beside(cls, mmproj: str | PathLike[str]) -> Bundle | None:
        """The bundle that an mmproj file belongs to, or None for a file that stands alone."""
        path = Path(mmproj)
        return cls.open(path.parent) if path.name == MMPROJ and (path.parent / MANIFEST).is_file() else None

    @property
    def model(self) -> Path:
        """The text model's GGUF file."""
        return self.folder / MODEL

    @property
    def mmproj(self) -> Path:
        """The vision tower's and projector's GGUF file."""
        return self.folder / MMPROJ

    @property
    def template(self) -> str:
        """The chat template, in Jinja."""
        return str(self.manifest["chat_template"])

    @property
    def preprocessing(self) -> Preprocessing:
        """How the checkpoint's own processor prepares images."""
        return Preprocessing.from_json(self.manifest["preprocessing"])

    @property
    def space_prefix(self) -> str:
        """Which pieces of text between special tokens get a leading space: "every", "first", "none", or
        "chunk": the first and those after an image."""
        return str(self.manifest["tokenizer"]["space_prefix"])

    def check_hashes(self) -> None:
        """Compare both files' SHA-256 with the recorded ones (reads them whole). Raises BundleError."""
        for name in (MODEL, MMPROJ):
            found, expected = sha256(self.folder / name), self.manifest["files"][name]["sha256"]
            if found != expected:
                raise BundleError(
                    f"{self.folder / name}: SHA-256 is {found[:12]}..., expected {expected[:12]}...;"
                    " the file changed since it was converted: convert again"
                )

    def _check_file(self, name: str) -> None:
        path, recorded = self.folder / name, self.manifest["files"][name]
        if not path.is_file():
            raise BundleError(f"{path}: missing, though {MANIFEST} names it; convert again")
        if (found := path.stat().st_size) != recorded["bytes"]:
            raise BundleError(f"{path}: found {found} bytes, expected {recorded['bytes']}; convert again")
        if header_sha256(path, recorded["header_bytes"]) != recorded["header_sha256"]:
            raise BundleError(self._foreign(path))

    def _foreign(self, path: Path) -> str:
        """Say what a file with another header is, with both widths where they differ."""
        expected = self.manifest["image"]["projected_width"]
        try:
            header = Header.read(path)
        except BundleError as error:
            return str(error)
        found = header.keys.get("clip.vision.projection_dim")
        if path.name == MMPROJ and found is not None and found != expected:
            return f"{path}: projects to width {found}, the text model has {expected}; it belongs to another model"
        return f"{path}: its header is not the one recorded in {MANIFEST}; it belongs to another model"


def describe_file(path: Path, digest: str | None = None) -> dict[str, Any]:
    """What the manifest records of a file: size, header length and both hashes (`digest` if it is known)."""
    header = Header.read(path)
    return {
        "bytes": header.file_bytes,
        "header_bytes": header.data_start,
        "header_sha256": header_sha256(path, header.data_start),
        "sha256": digest or sha256(path),
    }


def file_identity(path: Path) -> str:
    """What tells a file from any other that lay or will lie in its place, without reading it whole."""
    found = path.stat()
    return f"{header_sha256(path, Header.read(path).data_start)} {found.st_size} {found.st_mtime_ns}"


def header_sha256(path: Path, n_bytes: int) -> str:
    """SHA-256 of the first n_bytes: keys and tensor list, without tensor data."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(n_bytes)).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text("utf-8"))
        complete = (
            manifest["format"] == FORMAT
            and {MODEL, MMPROJ} <= set(manifest["files"])
            and {"chat_template", "preprocessing", "tokenizer", "image", "eos_token_ids"} <= set(manifest)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: not a bundle's manifest ({error}); convert again") from error
    if not complete:
        raise BundleError(f"{path}: found format {manifest['format']!r}, expected {FORMAT}; convert again")
    return dict(manifest)


def _nearest(folder: Path) -> str:
    """Name the bundles beside the place that was asked for."""
    try:
        found = sorted(p.parent.name for p in folder.parent.glob(f"*/{MANIFEST}"))
    except OSError:
        found = []
    return f"; there are {', '.join(found[:5])} beside it" if found else ""


def _what_lies_there(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return f"; it is a checkpoint: run `pocketllava convert {folder} --out DIR` first"
    return ", expected a folder made by `pocketllava convert`"

"""A bundle: a folder with model.gguf, mmproj.gguf and bundle.json, and the checks that none of them changed.

Knows sizes, hashes and file headers; no tensor data, no engine. A bundle is accepted when both files have the size
and the header that bundle.json recorded after they were verified.
"""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

from pocketllava.errors import BundleError, ModelNotFound
from pocketllava.models.gguf_header import Header, Part
from pocketllava.models.manifest import FORMAT, MANIFEST, MMPROJ, MODEL, FileRecord, Manifest
from pocketllava.models.mmproj_contract import MmprojInfo, check_mmproj
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.models.text_contract import TextInfo, check_text

__all__ = ["FORMAT", "MANIFEST", "MMPROJ", "MODEL", "Bundle", "Manifest"]

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
    """An opened bundle. `manifest` is bundle.json's content, checked."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Bundle:
        """Open a bundle's folder and check both files' sizes and headers (milliseconds).

        Raises ModelNotFound when there is no bundle, BundleError when a file is missing or changed.
        """
        folder = Path(path)
        if not folder.is_dir():
            state = "a file" if folder.exists() else "nothing"
            raise ModelNotFound(
                f"{folder}: found {state}, expected a folder made by `pocketllava convert`{_nearest(folder)}"
            )
        if not (folder / MANIFEST).is_file():
            raise ModelNotFound(f"{folder}: no {MANIFEST}{_hint(folder)}")
        bundle = cls(folder, Manifest.read(folder / MANIFEST))
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
        return self.path_of(MODEL)

    @property
    def mmproj(self) -> Path:
        """The vision tower's and projector's GGUF file."""
        return self.path_of(MMPROJ)

    def path_of(self, name: str) -> Path:
        """The path of MODEL or MMPROJ, which may have another name in a published pair, or lie elsewhere."""
        if (reference := self.manifest.references.get(name)) is not None:
            return Path(reference.path)
        return self.folder / self.manifest.file_names.get(name, name)

    def place_of(self, name: str) -> Path | Part:
        """The same, or the place inside a larger file."""
        path, reference = self.path_of(name), self.manifest.references.get(name)
        if reference is None or not reference.start:
            return path
        return Part(path, reference.start, self.manifest.files[name].bytes, path.name)

    @cached_property
    def model_header(self) -> Header:
        """The text model's keys and tensors, parsed once. Raises BundleError."""
        return Header.read(self.place_of(MODEL))

    @cached_property
    def mmproj_header(self) -> Header:
        """The mmproj's keys and tensors, parsed once. Raises BundleError."""
        return Header.read(self.place_of(MMPROJ))

    @cached_property
    def text_info(self) -> TextInfo:
        """The text model's shape. Raises BundleError for a file that llama.cpp would end the process over."""
        return check_text(self.model_header)

    @cached_property
    def mmproj_info(self) -> MmprojInfo:
        """The vision tower's shape. Raises BundleError for a file that libmtmd would end the process over."""
        return check_mmproj(self.mmproj_header)

    @property
    def template(self) -> str:
        """The chat template, in Jinja."""
        return self.manifest.chat_template

    @property
    def preprocessing(self) -> Preprocessing:
        """How the checkpoint's own processor prepares images."""
        return self.manifest.preprocessing

    @property
    def space_prefix(self) -> str:
        """Which text between special tokens gets a leading space (see Manifest)."""
        return self.manifest.space_prefix

    @property
    def image_tokens(self) -> int:
        """Positions that one picture takes in a prompt: 576 for LLaVA-1.5; at most 2,928 for LLaVA-1.6."""
        return self.preprocessing.most_tokens(math.isqrt(self.manifest.n_patches))

    def check_hashes(self) -> None:
        """Compare both files' SHA-256 with the recorded ones (reads them whole), as far as there are any.

        Raises BundleError.
        """
        for name in (MODEL, MMPROJ):
            if (expected := self.manifest.files[name].sha256) is None:
                continue
            if (actual := sha256(self.place_of(name))) != expected:
                raise BundleError(
                    f"{self.path_of(name)}: SHA-256 is {actual[:12]}..., expected {expected[:12]}...;"
                    f" the file changed since it was converted: {self._advice(name)}"
                )

    def _check_file(self, name: str) -> None:
        place, path, record = self.place_of(name), self.path_of(name), self.manifest.files[name]
        start = place.start if isinstance(place, Part) else 0
        if not path.is_file():
            raise BundleError(f"{path}: missing, though {MANIFEST} names it; {self._advice(name)}")
        size, whole = path.stat().st_size, start + record.bytes
        if size < whole or (size > whole and not start):
            raise BundleError(f"{path}: found {size} bytes, expected {whole}; {self._advice(name)}")
        try:
            digest = header_sha256(path, record.header_bytes, start)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
        if digest != record.header_sha256:
            raise BundleError(self._foreign(name, path))

    def _advice(self, name: str) -> str:
        """What to do about a file that is missing or another."""
        reference = self.manifest.references.get(name)
        if reference is None:
            return "convert again"
        owner = f"{reference.owner} owns it and may have removed or replaced it: " if reference.owner else ""
        return f"{owner}put it back, or `pocketllava import` it again"

    def _foreign(self, name: str, path: Path) -> str:
        """Say whose header a file has, with both widths where they differ."""
        expected = self.manifest.projected_width
        try:
            header = self.mmproj_header if path == self.mmproj else self.model_header
        except BundleError as error:
            return str(error)
        width = header.keys.get("clip.vision.projection_dim")
        if path == self.mmproj and width is not None and width != expected:
            return f"{path}: projects to width {width}, the text model has {expected}; it belongs to another model"
        other = "" if name not in self.manifest.references else f"; {self._advice(name)}"
        return f"{path}: its header is not the one recorded in {MANIFEST}; it belongs to another model{other}"


def describe_file(header: Header, digest: str | None) -> FileRecord:
    """What the manifest records of a file with this header and SHA-256."""
    n_bytes = header.header_bytes
    return FileRecord(header.file_bytes, n_bytes, header_sha256(header.path, n_bytes, header.start), digest)


def file_identity(path: Path, header: Header | None = None) -> str:
    """Tells a file from any other that lay or will lie under its path, without reading all of it.

    header: of the file, where the caller has it. Raises BundleError, OSError.
    """
    header = header or Header.read(path)
    status = path.stat()
    digest = header_sha256(path, header.header_bytes, header.start)
    return f"{digest} {status.st_size} {status.st_mtime_ns}"


def header_sha256(path: Path, n_bytes: int, start: int = 0) -> str:
    """SHA-256 of n_bytes from the GGUF file's start: keys and tensor list, without tensor data."""
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(n_bytes)).hexdigest()


def sha256(place: Path | Part) -> str:
    """SHA-256 of a whole file, or of the part of one, in hexadecimal."""
    part = place if isinstance(place, Part) else None
    digest, left = hashlib.sha256(), part.n_bytes if part else sys.maxsize
    with (part.path if part else Path(str(place))).open("rb") as file:
        file.seek(part.start if part else 0)
        while block := file.read(min(CHUNK_BYTES, left)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _nearest(folder: Path) -> str:
    """Name the bundles beside the place that was asked for."""
    try:
        names = sorted(p.parent.name for p in folder.parent.glob(f"*/{MANIFEST}"))
    except OSError:
        names = []
    return f"; there are {', '.join(names[:5])} beside it" if names else ""


def _hint(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return f"; it is a checkpoint: run `pocketllava convert {folder} --out DIR` first"
    return ", expected a folder made by `pocketllava convert`"

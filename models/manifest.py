"""bundle.json: what a conversion recorded of a bundle, typed and checked once.

Knows the file's keys and what each may hold; opens no other file. Keys on disk are those of format 1; the
dataclass has the names that the rest of the package uses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from pocketllava.errors import BundleError
from pocketllava.models.files import read_regular
from pocketllava.models.gguf_header import ALIGNMENT
from pocketllava.models.preprocessing import MAX_MEAN, Preprocessing
from pocketllava.models.tiling import MAX_PINPOINTS, MAX_TILES, MERGE_TYPES, Tiling

MANIFEST, MODEL, MMPROJ = "bundle.json", "model.gguf", "mmproj.gguf"
FORMAT = 1
IMAGE_TOKEN = "<image>"  # where a template puts an image, unless the checkpoint's vocabulary says otherwise
SPACE_PREFIXES = ("every", "first", "none", "chunk")
STRIP_SIDES = ("left", "right", "both")
MAX_MANIFEST_BYTES = 16 << 20  # of bundle.json; a chat template has a few kB
MAX_FILE_BYTES, MAX_HEADER_BYTES = 1 << 44, 1 << 30
MAX_DIMENSION = 1 << 20  # columns of a matrix, image tokens, pixels along an edge
MAX_TOKEN_ID = 1 << 22  # sixteen times the largest vocabulary there is
SHOWN_CHARACTERS = 80  # of a wrong value, in an error
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """The checkpoint: hub id or folder name, commit, and the bytes of its weight files by name."""

    id: str
    revision: str | None
    weights: Mapping[str, int]


@dataclass(frozen=True)
class Types:
    """Quantization types of the two files, such as "Q4_K_M" and "F16"."""

    model: str
    mmproj: str


@dataclass(frozen=True)
class FileRecord:
    """A file as it was verified. header_sha256 is of its first header_bytes: keys and tensor list.

    sha256: None for a file of another program that nobody has read whole.
    """

    bytes: int
    header_bytes: int
    header_sha256: str
    sha256: str | None

    @property
    def digest(self) -> str:
        """SHA-256 of the file where it is known, else of its header."""
        return self.sha256 or self.header_sha256


@dataclass(frozen=True)
class Reference:
    """A file outside the bundle's folder: its absolute path, and the program that it belongs to.

    start: where the GGUF file begins in it, as in a llamafile; 0 for a GGUF file.
    """

    path: str
    owner: str | None = None
    start: int = 0

    def to_json(self) -> dict[str, Any]:
        """As bundle.json has it."""
        return {"path": self.path, "owner": self.owner, **({"start": self.start} if self.start else {})}


@dataclass(frozen=True)
class QuantizedFrom:
    """The bundle of floats that `pocketllava quantize` read: its types, and SHA-256 by file name."""

    types: Types
    sha256: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """bundle.json's content.

    version: of the pocketllava that converted. file_names: of a published pair, whose files keep their own names, by
    the names that they would have in a bundle; references: of files that lie elsewhere. image_token: the text that
    stands for an image in the template; image_token_id: its row of the vocabulary, None where it has none. n_patches:
    of one picture, or of one tile where pictures are tiled. vision_width, projected_width: columns of the tower's
    features, before and after the projector. space_prefix: which text between special tokens gets a leading space:
    "every" run, only the "first", "none", or "chunk" (the first and those after an image). strip: special tokens that
    swallow white space
    beside them, and on which side.
    """

    version: str
    source: Source
    types: Types
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    file_names: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, Reference] = field(default_factory=dict)
    image_token: str
    image_token_id: int | None
    n_patches: int
    vision_width: int
    projected_width: int
    space_prefix: str
    eos_token_ids: tuple[int, ...]
    preprocessing: Preprocessing
    chat_template: str
    strip: Mapping[str, str] = field(default_factory=dict)
    quantized_from: QuantizedFrom | None = None

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check the file. Raises BundleError naming the key, the value and what was expected."""
        try:
            data = json.loads(read_regular(path, MAX_MANIFEST_BYTES))
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:SHOWN_CHARACTERS]
            raise BundleError(f"{path}: not a bundle's manifest ({reason}); convert again") from error
        return cls.from_json(data, path)

    @classmethod
    def from_json(cls, data: Any, path: Path) -> Manifest:
        """Check bundle.json's content; `path` is named in errors. Raises BundleError."""
        top = _Section(path, "", data)
        top.get("format", _exactly(FORMAT), str(FORMAT))
        image, files, tokenizer = top.section("image"), top.section("files"), top.section("tokenizer")
        references = _references(top)
        return cls(
            version=top.text("pocketllava"),
            source=_source(top.section("source")),
            types=_types(top.section("types")),
            files={
                name: _file(files.section(name), known=name not in references) for name in (MODEL, MMPROJ)
            },
            references=references,
            file_names=top.get("file_names", _file_names, "names of files in the bundle's folder")
            if "file_names" in top.value
            else {},
            image_token=image.text("token"),
            image_token_id=image.get("token_id", _optional(_id), "a token id or null"),
            n_patches=image.get("n_patches", _square, f"a square number from 1 to {MAX_DIMENSION}"),
            vision_width=image.count("vision_width"),
            projected_width=image.count("projected_width"),
            space_prefix=tokenizer.get(
                "space_prefix", _one_of(SPACE_PREFIXES), f"one of {', '.join(SPACE_PREFIXES)}"
            ),
            strip=tokenizer.get(
                "strip", _mapping(_one_of(STRIP_SIDES)), f"one of {', '.join(STRIP_SIDES)} by token"
            )
            if "strip" in tokenizer.value
            else {},
            eos_token_ids=top.get("eos_token_ids", _ids, "a list of token ids"),
            preprocessing=_preprocessing(top.section("preprocessing")),
            chat_template=top.text("chat_template"),
            quantized_from=_quantized_from(top),
        )

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        data = {
            "format": FORMAT,
            "pocketllava": self.version,
            "source": {
                "id": self.source.id,
                "revision": self.source.revision,
                "weights": dict(self.source.weights),
            },
            "types": asdict(self.types),
            "files": {name: asdict(record) for name, record in self.files.items()},
            "image": {
                "token": self.image_token,
                "token_id": self.image_token_id,
                "n_patches": self.n_patches,
                "vision_width": self.vision_width,
                "projected_width": self.projected_width,
            },
            "tokenizer": {
                "space_prefix": self.space_prefix,
                **({"strip": dict(self.strip)} if self.strip else {}),
            },
            "eos_token_ids": list(self.eos_token_ids),
            "preprocessing": asdict(self.preprocessing),
            "chat_template": self.chat_template,
        }
        if self.file_names:
            data["file_names"] = dict(self.file_names)
        if self.references:
            data["references"] = {name: reference.to_json() for name, reference in self.references.items()}
        if self.quantized_from is not None:
            origin = self.quantized_from
            data["quantized_from"] = {"types": asdict(origin.types), "sha256": dict(origin.sha256)}
        return data


class _Section:
    """An object of bundle.json, whose keys are checked when they are read."""

    def __init__(self, path: Path, name: str, value: Any) -> None:
        self.path, self.name = path, name
        if not isinstance(value, dict):
            raise self.wrong(name or "the file", value, "a JSON object")
        self.value = value

    def wrong(self, key: str, value: Any, expected: str) -> BundleError:
        shown = ascii(value)
        shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."
        return BundleError(f"{self.path}: {key} is {shown}, expected {expected}; convert again")

    def get(self, key: str, check: Callable[[Any], T], expected: str) -> T:
        """The checked value. `check` raises ValueError or TypeError for what is not `expected`."""
        full = f"{self.name}.{key}" if self.name else key
        if key not in self.value:
            raise BundleError(f"{self.path}: {full} is missing, expected {expected}; convert again")
        try:
            return check(self.value[key])
        except (ValueError, TypeError, OverflowError):
            raise self.wrong(full, self.value[key], expected) from None

    def section(self, key: str) -> _Section:
        value = self.get(key, lambda v: v, "a JSON object")
        return _Section(self.path, f"{self.name}.{key}" if self.name else key, value)

    def text(self, key: str) -> str:
        return self.get(key, _text, "text")

    def count(self, key: str) -> int:
        return self.get(key, _dimension, f"a whole number from 1 to {MAX_DIMENSION}")


def _source(section: _Section) -> Source:
    revision = section.get("revision", _optional(_text), "text or null")
    return Source(section.text("id"), revision, section.get("weights", _mapping(_size), "bytes by file name"))


def _types(section: _Section) -> Types:
    return Types(section.text("model"), section.text("mmproj"))


def _file(section: _Section, *, known: bool) -> FileRecord:
    """known: whether its SHA-256 has to be there."""
    n_bytes = section.get("bytes", _size, "a positive whole number")
    most = min(n_bytes, MAX_HEADER_BYTES)
    return FileRecord(
        n_bytes,
        section.get("header_bytes", lambda value: _whole(value, 1, most), f"1 to {most}"),
        section.get("header_sha256", _sha256, "64 hexadecimal digits"),
        section.get("sha256", _sha256 if known else _optional(_sha256), "64 hexadecimal digits"),
    )


def _references(top: _Section) -> dict[str, Reference]:
    if "references" not in top.value:
        return {}
    section = top.section("references")
    names = section.value.keys() & {MODEL, MMPROJ}
    if not names or names != section.value.keys():
        raise top.wrong("references", section.value, f"{MODEL}, {MMPROJ} or both")
    return {
        name: Reference(
            section.section(name).get("path", _absolute, "an absolute path"),
            section.section(name).get("owner", _optional(_text), "text or null"),
            _start(section.section(name), name),
        )
        for name in sorted(names)
    }


def _start(section: _Section, name: str) -> int:
    """Of a text model only, whose tensors libllama maps; libmtmd would open what the file begins with, unchecked."""
    if "start" not in section.value:
        return 0
    if name != MODEL:
        raise section.wrong("start", section.value["start"], "no such key: libmtmd opens whole files")
    return int(section.get("start", _aligned, f"a multiple of {ALIGNMENT} up to {MAX_FILE_BYTES}"))


def _quantized_from(top: _Section) -> QuantizedFrom | None:
    key = next((k for k in ("quantized_from", "quantised_from") if k in top.value), None)
    if key is None:
        return None
    section = top.section(key)
    hashes = section.get("sha256", _mapping(_sha256), "SHA-256 by file name")
    return QuantizedFrom(_types(section.section("types")), hashes)


def _preprocessing(section: _Section) -> Preprocessing:
    return Preprocessing(
        shortest_edge=section.get("shortest_edge", _optional(_dimension), "a positive whole number or null"),
        crop_size=section.count("crop_size"),
        resample=section.get("resample", _one_of(range(6)), "one of Pillow's filters, 0 to 5"),
        mean=section.get("mean", _three(positive=False), "three finite numbers"),
        std=section.get("std", _three(positive=True), "three finite positive numbers"),
        pad_to_square=section.get("pad_to_square", _one_of((False, True)), "true or false"),
        tiling=_tiling(section) if section.value.get("tiling") is not None else None,
    )


def _tiling(preprocessing: _Section) -> Tiling:
    section, side = preprocessing.section("tiling"), preprocessing.count("crop_size")

    def pinpoints(value: Any) -> tuple[tuple[int, int], ...]:
        sizes = tuple((_dimension(width), _dimension(height)) for width, height in value)
        if not 0 < len(sizes) <= MAX_PINPOINTS or any(
            width % side or height % side or width * height > MAX_TILES * side**2 for width, height in sizes
        ):
            raise ValueError
        return sizes

    return Tiling(
        section.get("pinpoints", pinpoints, f"widths and heights that are multiples of {side}"),
        section.get("merge", _one_of(MERGE_TYPES), f"one of {', '.join(MERGE_TYPES)}"),
    )


def _file_names(value: Any) -> dict[str, str]:
    """Of files in the manifest's own folder."""
    names = {key: _text(name) for key, name in value.items()} if type(value) is dict else {}
    if set(names) != {MODEL, MMPROJ} or any(
        set(name) & set("/\\:\0") or name == ".." for name in names.values()
    ):
        raise ValueError
    return names


def _absolute(value: Any) -> str:
    """Of this system or another, on which it names nothing; bytes that are not UTF-8 are Python's surrogates."""
    if type(value) is not str or "\0" in value:
        raise ValueError
    value.encode("utf-8", "surrogateescape")
    if not (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        raise ValueError
    return value


def _whole(value: Any, first: int, last: int) -> int:
    if type(value) is not int or not first <= value <= last:
        raise ValueError
    return value


def _aligned(value: Any) -> int:
    if _size(value) % ALIGNMENT:
        raise ValueError
    return int(value)


def _size(value: Any) -> int:
    return _whole(value, 1, MAX_FILE_BYTES)


def _dimension(value: Any) -> int:
    return _whole(value, 1, MAX_DIMENSION)


def _square(value: Any) -> int:
    if math.isqrt(_dimension(value)) ** 2 != value:
        raise ValueError
    return int(value)


def _id(value: Any) -> int:
    return _whole(value, 0, MAX_TOKEN_ID)


def _ids(value: Any) -> tuple[int, ...]:
    if type(value) is not list or not value:
        raise ValueError
    return tuple(map(_id, value))


def _text(value: Any) -> str:
    if type(value) is not str or not value:
        raise ValueError
    value.encode()  # a lone surrogate is a ValueError: no tokenizer or terminal can take it
    return value


def _sha256(value: Any) -> str:
    if type(value) is not str or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError
    return value


def _three(*, positive: bool) -> Callable[[Any], tuple[float, float, float]]:
    def check(value: Any) -> tuple[float, float, float]:
        r, g, b = value
        numbers = (r, g, b)
        if any(
            type(n) not in (int, float) or not abs(n) <= MAX_MEAN or (positive and n <= 0) for n in numbers
        ):
            raise ValueError
        return float(r), float(g), float(b)

    return check


def _mapping(check: Callable[[Any], T]) -> Callable[[Any], dict[str, T]]:
    def checked(value: Any) -> dict[str, T]:
        if type(value) is not dict:
            raise ValueError
        return {_text(name): check(item) for name, item in value.items()}

    return checked


def _optional(check: Callable[[Any], T]) -> Callable[[Any], T | None]:
    return lambda value: None if value is None else check(value)


def _exactly(expected: T) -> Callable[[Any], T]:
    return _one_of((expected,))


def _one_of(choices: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        """Of the same type too: True is no 1."""
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError
        return value

    return check

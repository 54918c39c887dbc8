"""Damaged safetensors headers, torch zip archives, pickles and SentencePiece models: read, or refused in one line."""

from __future__ import annotations

import functools
import io
import json
import pickletools
import random
import tempfile
import zipfile
from pathlib import Path

import small_checkpoint
import small_pickle
from attack.child import Target
from attack.images import number_changed
from damage import bytes_changed, spoil_header

from pocketllava.convert.read.safetensors import read_safetensors
from pocketllava.convert.read.sources import SourceTensor
from pocketllava.convert.read.torch_zip import read_pickled
from pocketllava.convert.read.vocab import read_sentencepiece

TENSORS = [
    (f"layer.{n}.weight", kind, (4, 6), bytes(24 * small_pickle.WIDTH[kind]))
    for n, kind in enumerate(("F32", "F16", "BF16"))
]
OPCODES = b"".join(code.code.encode("latin-1") for code in pickletools.opcodes)


@functools.cache
def whole(name: str) -> bytes:
    """An intact file: "safetensors", "bin" or "model"."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, name)
        if name == "safetensors":
            small_checkpoint.write_safetensors(path, TENSORS)
        elif name == "bin":
            small_pickle.write_bin(path, TENSORS)
        else:
            path = small_checkpoint.write(Path(place) / "a", layers=1, ffn=256) / "tokenizer.model"
        return path.read_bytes()


def header(rng: random.Random) -> bytes:
    """A safetensors file whose header is damaged."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "a")
        path.write_bytes(whole("safetensors"))
        (
            spoil_header
            if rng.random() < 0.8
            else lambda r, p: p.write_bytes(bytes_changed(r, p.read_bytes()))
        )(rng, path)
        return path.read_bytes()


def archive(rng: random.Random) -> bytes:
    """A .bin file damaged as a zip archive."""
    data = whole("bin")
    for _ in range(rng.choice((1, 1, 2, 4))):
        if rng.random() < 0.5 and data:
            at = rng.randrange(len(data) // 2, len(data))  # the directory is at the end
            data = data[:at] + number_changed(rng, data[at:])
        else:
            data = bytes_changed(rng, data)
    return data


def pickled(rng: random.Random) -> bytes:
    """A .bin file whose archive is intact and whose pickle is not: opcodes changed, put in, repeated."""
    with zipfile.ZipFile(io.BytesIO(whole("bin"))) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    name = next(n for n in entries if n.endswith("data.pkl"))
    data = entries[name]
    for _ in range(rng.choice((0, 1, 1, 2, 6))):
        at = rng.randrange(len(data) or 1)
        code = bytes([rng.choice(OPCODES)])
        data = rng.choice((
            data[:at] + code + data[at + 1 :], data[:at] + code + data[at:], bytes_changed(rng, data), number_changed(rng, data),
            data[:at] + (code * rng.choice((2, 1000, 100_000))) + data[at:], data[:-1] + code * 5000 + b".",
        ))  # fmt: skip
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for key, content in (entries | {name: data}).items():
            file.writestr(key, content)
    return out.getvalue()


def vocabulary(rng: random.Random) -> bytes:
    """A damaged tokenizer.model."""
    data = whole("model")
    for _ in range(rng.choice((1, 1, 2, 6))):
        data = bytes_changed(rng, data) if rng.random() < 0.6 else number_changed(rng, data)
    return data


def check(tensors: list[SourceTensor], path: Path) -> None:
    """Every tensor lies in the file."""
    size = path.stat().st_size
    assert all(0 <= t.offset <= t.offset + t.n_bytes <= size for t in tensors), tensors


def use_safetensors(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    check(read_safetensors(folder / "model.safetensors"), folder / "model.safetensors")


def use_archive(data: bytes, folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(data)
    check(read_pickled(folder / "pytorch_model.bin"), folder / "pytorch_model.bin")


def use_vocabulary(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(data)
    vocab = read_sentencepiece(folder / "tokenizer.model")
    assert len(vocab.tokens) == len(vocab.scores) == len(vocab.types)
    json.dumps(vocab.tokens).encode()


TARGETS = {
    "safetensors": Target(header, use_safetensors),
    "torch zip": Target(archive, use_archive),
    "torch pickle": Target(pickled, use_archive),
    "tokenizer.model": Target(vocabulary, use_vocabulary),
}

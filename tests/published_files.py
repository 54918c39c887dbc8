"""Header listings of published files -> GGUF files with these keys and their real tensors' shapes, without the data.

tests/published/ holds the listings as llama.cpp prints them, each with its source. Knows the tensors that llama.cpp's
scripts wrote: of a Llama, and of CLIP ViT-L's first 23 blocks with LLaVA's two layers. Files are sparse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from gguf import quants

from pocketllava.models.gguf_header import ARCHITECTURE, TensorInfo
from pocketllava.models.gguf_writer import Key, header_bytes, padding

LISTINGS = Path(__file__).parent / "published"
KINDS = {"str": V.STRING, "u32": V.UINT32, "i32": V.INT32, "f32": V.FLOAT32, "bool": V.BOOL}
SPECIAL = {32000: (), 64000: ("<|im_start|>", "<|im_end|>"), 128256: ("<|start_header_id|>", "<|eot_id|>")}
SIZES = {T.F32: 4, T.F16: 2}  # bytes of a value
Shape = tuple[str, tuple[int, ...]]


def listed(name: str) -> list[Key]:
    """A listing's keys. What llama.cpp cuts short, such as a vocabulary, is made up to its length."""
    rows = (LISTINGS / f"{name}.txt").read_text("utf-8").splitlines()
    return [_key(row) for row in rows if not row.startswith("#")]


def build(folder: Path, name: str, *, width: int = 4096) -> Path:
    """The file of a listing. width: what LLaVA's two layers project to; 0 for a tower without them."""
    keys = listed(name)
    values = {key.name: key.value for key in keys}
    path = folder / f"{name}.gguf"
    infos, end = [], 0
    for tensor, shape in _shapes(values, width):
        kind = _type(tensor, shape, values)
        n_bytes = _n_bytes(shape, kind)
        infos.append(TensorInfo(tensor, shape, int(kind), end, n_bytes))
        end += n_bytes + len(padding(n_bytes))
    own = [key for key in keys if key.name != ARCHITECTURE]  # which header_bytes writes itself
    header = header_bytes(values[ARCHITECTURE], own, infos)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    return path


def whole_listings() -> list[str]:
    """Those that are not only a file's first keys."""
    files = sorted(LISTINGS.glob("*.txt"))
    return [path.stem for path in files if path.read_text("utf-8").splitlines()[2][2:3].isdigit()]


def said_counts(name: str) -> tuple[int, int]:
    """How many keys and tensors a listing's source names."""
    line = (LISTINGS / f"{name}.txt").read_text("utf-8").splitlines()[2]
    words = line.replace(":", "").split()
    return int(words[1]), int(words[words.index("tensors") - 1])


def _key(row: str) -> Key:
    about, _, text = row.partition(" = ")
    name, kind = about.split(" ", 1)
    if not kind.startswith("arr"):
        return Key(name, _scalar(text, kind), KINDS[kind])
    item, _, length = kind.removeprefix("arr[").removesuffix("]").partition(",")
    return Key(name, _array(name, text, item, int(length)), V.ARRAY, KINDS[item])


def _scalar(text: str, kind: str) -> Any:
    read = {"str": str, "u32": int, "i32": int, "f32": float, "bool": lambda t: t == "true"}
    return read[kind](text)


def _array(name: str, text: str, item: str, length: int) -> list[Any]:
    if not text.endswith("..."):
        return list(json.loads(text))
    last = name.rpartition(".")[2]
    if last == "tokens":
        known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPECIAL[length]]
        return [*known, *(f"t{i}" for i in range(length - len(known)))]
    if last == "merges":
        return ["t 1"] * length
    return [0.0 if item == "f32" else 1] * length


def _type(tensor: str, shape: tuple[int, ...], values: dict[str, Any]) -> T:
    """Matrices have the file's type, the patches' convolution F16, vectors F32."""
    if len(shape) == 1:
        return T.F32
    kind = {2: T.Q4_0, 15: T.Q4_K, 17: T.Q5_K}.get(values["general.file_type"], T.F16)
    return kind if len(shape) == 2 else T.F16


def _n_bytes(shape: tuple[int, ...], kind: T) -> int:
    rows = math.prod(shape[:-1])
    return (
        rows * quants.quant_shape_to_byte_shape(shape[-1:], kind)[0]
        if kind not in SIZES
        else SIZES[kind] * math.prod(shape)
    )


def _shapes(values: dict[str, Any], out: int) -> Iterator[Shape]:
    if values[ARCHITECTURE] == "llama":
        return _llama(values)
    if values.get("clip.projector_type", "mlp") == "mlp" and "clip.vision.block_count" in values:
        return _clip(values, out)
    return iter(())


def _llama(values: dict[str, Any]) -> Iterator[Shape]:
    def size(name: str) -> int:
        return int(values[f"llama.{name}"])

    width, wide, vocabulary = (
        size("embedding_length"),
        size("feed_forward_length"),
        len(values["tokenizer.ggml.tokens"]),
    )
    kv = width * size("attention.head_count_kv") // size("attention.head_count")
    yield "token_embd.weight", (vocabulary, width)
    for block in range(size("block_count")):
        for name, shape in (
            ("attn_q", (width, width)),
            ("attn_k", (kv, width)),
            ("attn_v", (kv, width)),
            ("attn_output", (width, width)),
            ("ffn_gate", (wide, width)),
            ("ffn_up", (wide, width)),
            ("ffn_down", (width, wide)),
            ("attn_norm", (width,)),
            ("ffn_norm", (width,)),
        ):
            yield f"blk.{block}.{name}.weight", shape
    yield "output_norm.weight", (width,)
    yield "output.weight", (vocabulary, width)


def _clip(values: dict[str, Any], out: int) -> Iterator[Shape]:
    """As the scripts name them: fc1 is ffn_down, fc2 is ffn_up, the newline has its old name."""
    width, wide = values["clip.vision.embedding_length"], values["clip.vision.feed_forward_length"]
    side = values["clip.vision.patch_size"]
    grid = values["clip.vision.image_size"] // side
    yield "v.class_embd", (width,)
    yield "v.patch_embd.weight", (width, 3, side, side)
    yield "v.position_embd.weight", (grid * grid + 1, width)
    for kind in ("weight", "bias"):
        yield f"v.pre_ln.{kind}", (width,)
    for block in range(values["clip.vision.block_count"]):
        at = f"v.blk.{block}."
        for name, shape in (
            *((part, (width, width)) for part in ("attn_q", "attn_k", "attn_v", "attn_out")),
            ("ffn_down", (wide, width)),
            ("ffn_up", (width, wide)),
        ):
            yield f"{at}{name}.weight", shape
            yield f"{at}{name}.bias", shape[:1]
        for norm in ("ln1", "ln2"):
            for kind in ("weight", "bias"):
                yield f"{at}{norm}.{kind}", (width,)
    if out:
        yield from (("mm.0.weight", (out, width)), ("mm.0.bias", (out,)))
        yield from (("mm.2.weight", (out, out)), ("mm.2.bias", (out,)))
    if "clip.vision.image_grid_pinpoints" in values:
        yield "model.image_newline", (out,)

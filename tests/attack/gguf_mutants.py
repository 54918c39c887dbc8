"""Damaged GGUF files of both kinds, drawn from a seed: keys, vocabularies, tensor lists, header bytes.

Knows the container and which keys llama.cpp reads; loads nothing (gguf.py does).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES

from pocketllava.models import mmproj_contract, text_contract
from pocketllava.models.contract import Rule
from pocketllava.models.gguf_header import ARRAY, SCALARS, STRING, Header
from pocketllava.models.text_contract import PRE_TOKENIZERS, TOKEN_IDS

Draw = random.Random
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 11, 16, 32, 64, 128, 255, 256, 511, 512, 513, 703, 704, 705, 960, 65535, 2**20 - 1,
           2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, -1, -(2**31))  # fmt: skip
REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, 1e4, 5e5, float("nan"), float("inf"), -float("inf"))
WORDS = ("", "x", "mlp", "ldp", "resampler", "llama", "gpt2", "bert", "none", "no_vocab", "t5", "rwkv", "gemma4", "hybriddna", "plamo2", "clip",
         "linear", "yarn", "longrope", "su", "phi-3", "Phi3 mini", "modern-bert", "llama\0x", "a\0", "<s>", "</s>",
         "<0x0A>", "[EMPTY_5]", "[EMPTY_0]", "<unk>", "\ufffd", "日本", "é" * 300, "x" * 2000, "{{", "{% for x in",
         "{{ " + "(" * 500, "<|end|>", "<|return|>", "<|call|>", "<|tool_response>", "tekken", "chatglm-bpe", "default", *PRE_TOKENIZERS.split())  # fmt: skip
OTHER_KEYS = (
    "llama.attention.sliding_window", "llama.attention.scale", "llama.logit_scale", "llama.expert_shared_count",
    "llama.expert_feed_forward_length", "llama.leading_dense_block_count", "llama.n_deepstack_layers",
    "llama.attention.clamp_kqv", "llama.attention.max_alibi_bias", "llama.classifier.output_labels",
    "llama.tensor_data_layout", "llama.use_parallel_residual", "llama.rope.dimension_sections", "split.no",
    "split.tensors.count", "general.quantization_version", "general.type", "general.sampling.top_k", "adapter.type",
    "tokenizer.ggml.suppress_tokens", "tokenizer.ggml.precompiled_charsmap", "tokenizer.chat_template",
    "tokenizer.chat_template.tool_use", "tokenizer.chat_templates", "tokenizer.ggml.merges", "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.huggingface.json",
    "llama.attention.head_count", "llama.attention.head_count_kv", "llama.feed_forward_length",
    "llama.rope.scaling.yarn_log_multiplier", "llama.rope.scaling.yarn_ext_factor", "llama.swin_norm", "zzz",
)  # fmt: skip
RULES: dict[str, Rule] = {**text_contract.RULES, **mmproj_contract.OPTIONAL}
TEXT_KEYS = (*text_contract.RULES, *TOKEN_IDS, *OTHER_KEYS)
MMPROJ_KEYS = (
    *mmproj_contract.KNOWN, "clip.audio.projector_type", "clip.audio.block_count", "clip.gen.audio.projector_type",
    "clip.minicpmv_version", "clip.minicpmv_query_num", "clip.vision.spatial_merge_size", "clip.vision.window_size",
    "clip.vision.projector.scale_factor", "clip.vision.image_min_pixels", "clip.vision.wa_layer_indexes",
    "clip.vision.sam.block_count", "clip.vision.n_wa_pattern", "clip.text.context_length", "clip.nobody", "split.count",
    "general.type", "general.quantization_version", "general.tags", "general.size_label", "zzz",
)  # fmt: skip
TEXT_TENSORS = (
    "rope_freqs.weight", "rope_factors_long.weight", "output.weight", "blk.0.attn_qkv.weight", "blk.0.attn_q.bias",
    "blk.0.ffn_gate_inp.weight", "blk.0.attn_rot_embd", "blk.1.attn_q.weight", "cls.weight", "blk.0.attn_q.scale",
    "blk.0.ffn_down.bias", "output.bias",
)  # fmt: skip
MMPROJ_TENSORS = (
    "v.class_embd", "v.patch_embd.bias", "v.patch_embd.weight.1", "v.post_ln.weight", "v.post_ln.bias", "mm.1.weight",
    "mm.1.bias", "mm.3.weight", "mm.4.bias", "mm.model.fc.weight", "model.image_newline", "v.view_seperator",
    "v.blk.0.attn_qkv.weight", "v.blk.0.ls1.weight", "v.blk.9.ln1.weight", "v.blk.0.attn_q_norm.weight", "a.conv1d.1.weight",
    "v.norm_embd.weight", "mm.input_norm.weight",
)  # fmt: skip


@dataclass
class Tensor:
    """A tensor as a header lists it; `dims` is in the file's order."""

    name: str
    dims: list[int]
    type: int
    offset: int


@dataclass
class File:
    """A GGUF file that may say anything. keys: name, value type, value, type of an array's items."""

    keys: list[tuple[str, int, Any, int]]
    tensors: list[Tensor]
    data: bytes
    version: int = 3
    counts: list[int] = field(default_factory=lambda: [0, 0])  # added to the true numbers of tensors and keys

    @classmethod
    def read(cls, path: Path) -> File:
        """A whole file's content."""
        header = Header.read(path)
        keys = [
            (name, header.key_types[name], value, header.item_types.get(name, 0))
            for name, value in header.keys.items()
        ]
        tensors = [Tensor(t.name, list(t.shape[::-1]), t.type, t.offset) for t in header.tensors.values()]
        return cls(keys, tensors, path.read_bytes()[header.data_start :])

    def copy(self) -> File:
        """One whose lists may be changed."""
        keys = [(n, k, list(v) if isinstance(v, list) else v, i) for n, k, v, i in self.keys]
        tensors = [Tensor(t.name, list(t.dims), t.type, t.offset) for t in self.tensors]
        return File(keys, tensors, self.data, self.version)

    def header(self) -> bytes:
        """Everything before the data."""
        parts = [b"GGUF", struct.pack("<I", self.version)]
        n_tensors, n_keys = len(self.tensors) + self.counts[0], len(self.keys) + self.counts[1]
        parts += [struct.pack("<QQ", n_tensors % 2**64, n_keys % 2**64)]
        for name, kind, value, item in self.keys:
            parts += [text(name), struct.pack("<I", kind)]
            if kind == ARRAY:
                parts += [struct.pack("<IQ", item, len(value)), *(scalar(item, v) for v in value)]
            else:
                parts.append(scalar(kind, value))
        for t in self.tensors:
            dims = struct.pack(f"<I{len(t.dims)}Q", len(t.dims), *(d % 2**64 for d in t.dims))
            parts += [text(t.name), dims, struct.pack("<IQ", t.type % 2**32, t.offset % 2**64)]
        whole = b"".join(parts)
        return whole + bytes(-len(whole) % self.alignment)

    @property
    def is_mmproj(self) -> bool:
        """Whether it began as a projector file; its architecture may say otherwise by now."""
        return any(t.name.startswith(("v.", "mm.")) for t in self.tensors)

    @property
    def known_keys(self) -> tuple[str, ...]:
        """Keys that mean something in such a file."""
        return MMPROJ_KEYS if self.is_mmproj else TEXT_KEYS

    @property
    def alignment(self) -> int:
        """Bytes, as the file says, or 32 where that would be absurd."""
        n = next((v for name, kind, v, _ in self.keys if name == "general.alignment" and kind == 4), 32)
        return int(n) if 0 < n <= 1 << 16 else 32

    def lay_out(self) -> None:
        """Give every tensor the place and the data that its shape and type ask for, where they are few."""
        end = 0
        for t in self.tensors:
            block, n_bytes = {int(k): v for k, v in GGML_QUANT_SIZES.items()}.get(t.type, (1, 1))
            t.offset = end
            n = int(np.prod([float(d) for d in t.dims])) // block * n_bytes
            end += -(-n // self.alignment) * self.alignment
        if end < 1 << 26:
            self.data = (self.data * (end // len(self.data) + 1))[:end]


def text(value: str) -> bytes:
    """A GGUF string."""
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    """A value in some GGUF type, made to fit."""
    if kind == STRING:
        return text(str(value))
    code = SCALARS.get(kind)
    if code is None:
        return b""
    number = value if isinstance(value, (int, float)) else len(value)
    if code in "fd":
        return struct.pack(
            "<" + code, min(max(float(number), -3e38), 3e38) if abs(number) < 1e300 else number
        )
    if code == "?":
        return bytes([int(number == number and number != 0)])
    whole = int(number) if number == number and abs(number) < 1e30 else 0
    size = struct.calcsize(code)
    return (whole % 256**size).to_bytes(size, "little")


def value_of(rng: Draw, kind: int) -> Any:
    """Something of a type."""
    if kind == STRING:
        return rng.choice(WORDS)
    return rng.choice(REALS if kind in (6, 12) else (True, False) if kind == 7 else NUMBERS)


def change_value(rng: Draw, file: File) -> str:
    """Another value of the same type."""
    at = rng.randrange(len(file.keys))
    name, kind, value, item = file.keys[at]
    if kind == ARRAY:
        return change_items(rng, file, at)
    near = [value + 1, value - 1, value * 2, value // 2] if kind in (4, 5, 10) else []
    value = rng.choice([*near, value_of(rng, kind), value_of(rng, kind)])
    file.keys[at] = (name, kind, value, item)
    return f"{name} = {value!r:.60}"


def change_items(rng: Draw, file: File, at: int) -> str:
    """An array with an item more or less, another item, another type of items."""
    name, kind, value, item = file.keys[at]
    i, how = rng.randrange(max(1, len(value))), rng.randrange(8)
    if how == 0:
        value = value[:i]
    elif how == 1:
        value = [*value, value[i] if value else 0]
    elif how == 2:
        item = rng.choice([*SCALARS, STRING, ARRAY, 13])
    elif how == 3:
        value = []
    elif how == 4 and value:
        value[i] = rng.choice(value)
    elif how == 5 and value:
        j = rng.randrange(len(value))
        value[i], value[j] = value[j], value[i]
    elif how == 6:
        value = [value_of(rng, item) for _ in value]
    elif value:
        value[i] = value_of(rng, item)
    file.keys[at] = (name, kind, value, item)
    return f"{name}: items, {how} at {i}"


def change_array(rng: Draw, file: File) -> str:
    """One of the vocabulary's arrays."""
    arrays = [i for i, (_, kind, _, _) in enumerate(file.keys) if kind == ARRAY]
    return change_items(rng, file, rng.choice(arrays)) if arrays else "nothing"


def change_type(rng: Draw, file: File) -> str:
    """The value in another type."""
    at = rng.randrange(len(file.keys))
    name, _, value, item = file.keys[at]
    kind = rng.choice([*SCALARS, STRING, ARRAY, 13, 255])
    if kind == ARRAY:
        item = rng.choice([4, 5, 6, 8])
        value = [value if not isinstance(value, list) else 0] * rng.choice((0, 1, 2, 4))
    elif isinstance(value, list):
        value = len(value)
    file.keys[at] = (name, kind, value, item)
    return f"{name} as type {kind}"


def change_key(rng: Draw, file: File) -> str:
    """A key left out, renamed, twice, or elsewhere."""
    at, how = (
        rng.randrange(len(file.keys)),
        rng.choice(("left out", "renamed", "twice", "moved", "zero byte")),
    )
    key = file.keys[at]
    if how in ("left out", "moved"):
        del file.keys[at]
    if how == "renamed":
        file.keys[at] = (rng.choice((key[0] + "x", key[0][:-1], "", rng.choice(file.known_keys))), *key[1:])
    if how in ("twice", "moved"):
        file.keys.insert(rng.randrange(len(file.keys) + 1), key)
    if how == "zero byte":
        kind = rng.choice([*SCALARS, STRING])
        file.keys.insert(at, (key[0] + "\0x", kind, value_of(rng, kind), 0))
    return f"{key[0]} {how}"


def add_key(rng: Draw, file: File) -> str:
    """A key that libllama reads, or reads for other models, with a value of mostly the right type."""
    name = rng.choice(file.known_keys)
    kind = (
        RULES[name].kind
        if name in RULES and rng.random() < 0.7
        else rng.choice([*SCALARS, STRING, ARRAY, 4, 6])
    )
    item = rng.choice([4, 5, 6, 8])
    value: Any = value_of(rng, kind if kind != ARRAY else item)
    if kind == ARRAY:
        value = [value] * rng.choice((0, 1, 2, 4, 512))
    file.keys = [key for key in file.keys if key[0] != name]
    file.keys.insert(rng.randrange(len(file.keys) + 1), (name, kind, value, item))
    return f"{name} = {value!r:.60} as type {kind}"


def change_token(rng: Draw, file: File) -> str:
    """A token's text, or the types of some."""
    at = next((i for i, key in enumerate(file.keys) if key[0] == "tokenizer.ggml.tokens"), None)
    kinds = next((key[2] for key in file.keys if key[0] == "tokenizer.ggml.token_type"), None)
    if at is None or not isinstance(tokens := file.keys[at][2], list) or not tokens:
        return "nothing"
    i = rng.randrange(len(tokens))
    if rng.random() < 0.4 and isinstance(kinds, list) and len(kinds) == len(tokens):
        for i in rng.choices(range(len(tokens)), k=rng.choice((1, 1, 8, 300))):
            kinds[i] = rng.choice((0, 1, 2, 3, 4, 5, 6, 6, 6, 7, -1, 2**31 - 1))
        return "types of tokens"
    tokens[i] = rng.choice(
        (
            rng.choice(tokens),
            "",
            "\0",
            tokens[i] + "\0a",
            "\udcff",
            "\udcff\udc80",
            "x" * 5000,
            "日" * 3000,
            *WORDS,
        )
    )
    return f"token {i} = {tokens[i]!r:.40}"


def change_tensor(rng: Draw, file: File) -> str:
    """A tensor's name, shape, type or place; one too many or too few."""
    if not file.tensors:
        return "nothing"
    t = rng.choice(file.tensors)
    before, how = (
        t.name,
        rng.choice(("name", "dims", "dims", "type", "type", "type", "offset", "drop", "twice", "add")),
    )
    if how == "name":
        t.name = rng.choice((t.name + "x", t.name[:-1], "x" * 64, "", t.name + "\0", "blk.9999.attn_q.weight",
                             t.name.replace("weight", "bias"), t.name.replace("weight", "scale")))  # fmt: skip
    elif how == "dims" and t.dims:
        i = rng.randrange(len(t.dims))
        t.dims = rng.choice(
            (t.dims[::-1], [*t.dims, 1], [*t.dims, 2], t.dims[:-1], t.dims * 3,
             [*t.dims[:i], rng.choice([t.dims[i] + 1, t.dims[i] * 2, t.dims[i] // 2, *NUMBERS]), *t.dims[i + 1 :]])
        )  # fmt: skip
    elif how == "type":
        t.type = rng.choice([*map(int, GGML_QUANT_SIZES), 4, 5, 42, 2**31])
    elif how == "offset":
        t.offset += rng.choice((1, 32, -32, 2**32, 2**63, 2**64 - 32, -t.offset))
    elif how == "drop":
        file.tensors.remove(t)
    elif how == "twice":
        file.tensors.append(t)
    else:
        names = MMPROJ_TENSORS if file.is_mmproj else TEXT_TENSORS
        dims = rng.choice(([32], [64], [256], [64, 64], [256, 256], [256, 704], [1]))
        file.tensors.append(Tensor(rng.choice(names), dims, rng.choice((0, 0, 1, 8)), 0))
    if rng.random() < 0.75 and how != "offset":
        file.lay_out()
    return f"{before}: {how} {t.name[:30]} {t.dims} {t.type}"


def change_shape(rng: Draw, file: File) -> str:
    """Sizes that fit each other, but are odd: heads, layers, context, tied output."""
    values = {name: i for i, (name, *_) in enumerate(file.keys)}

    def put(name: str, value: Any, kind: int = 4) -> None:
        if name in values:
            file.keys[values[name]] = (name, kind, value, 0)
        else:
            file.keys.append((name, kind, value, 0))

    heads = rng.choice((1, 2, 4, 8, 16, 64, 128, 256))
    if file.is_mmproj:
        return change_tower(rng, file, heads, put)
    how = rng.randrange(5)
    if how == 0:
        put("llama.attention.head_count", heads)
        put("llama.attention.head_count_kv", heads)
        put("llama.rope.dimension_count", 256 // heads)
        for name in ("key_length", "value_length"):
            if f"llama.attention.{name}" in values or rng.random() < 0.3:
                put(f"llama.attention.{name}", 256 // heads)
        file.tensors = [t for t in file.tensors if t.name != "rope_freqs.weight"]
    elif how == 1:
        file.tensors = [t for t in file.tensors if t.name != "output.weight"]
    elif how == 2:
        put("llama.context_length", rng.choice((1, 2, 255, 256, 2**20, 2**31 - 1)))
    elif how == 3:
        put("llama.rope.scaling.type", rng.choice(("none", "linear", "yarn", "longrope")), STRING)
        put("llama.rope.scaling.factor", rng.choice(REALS), 6)
        put("llama.rope.scaling.original_context_length", rng.choice((1, 32, 4096)))
    else:
        for t in file.tensors:
            if len(t.dims) == 2 and rng.random() < 0.5:
                t.type = rng.choice([int(k) for k in GGML_QUANT_SIZES])
    file.lay_out()
    return f"shape {how} with {heads} heads"


def change_tower(rng: Draw, file: File, heads: int, put: Callable[..., None]) -> str:
    """Sizes of a vision tower that fit each other, but are odd: heads, blocks, layers of features, types of matrices."""
    how = rng.randrange(6)
    if how == 0:
        put("clip.vision.attention.head_count", rng.choice((heads, 3, 32)))
    elif how == 1:
        put("clip.vision.block_count", rng.choice((0, 1, 2, 3, 23, 24, 512, 513, 2**20 - 1)))
    elif how == 2:
        layers = rng.choice(([0], [1], [2], [3], [1, 2], [2, 1], [0, 1, 2], [-1], [2] * 999, []))
        file.keys = [key for key in file.keys if key[0] != "clip.vision.feature_layer"]
        file.keys.append(("clip.vision.feature_layer", ARRAY, layers, rng.choice((5, 5, 5, 4, 11, 6))))
    elif how == 3:
        file.tensors = [t for t in file.tensors if t.name != rng.choice(("v.class_embd", "v.pre_ln.weight"))]
    elif how == 4:
        side, patch = rng.choice(
            ((336, 14), (335, 14), (14, 14), (28, 14), (336, 1), (2**20 - 1, 1), (14, 336))
        )
        put("clip.vision.image_size", side)
        put("clip.vision.patch_size", patch)
    else:
        for t in file.tensors:
            if len(t.dims) == 2 and rng.random() < 0.5:
                t.type = rng.choice([int(k) for k in GGML_QUANT_SIZES])
    file.lay_out()
    return f"tower {how} with {heads} heads"


def change_data(rng: Draw, file: File) -> str:
    """Weights: noise, NaN, infinities."""
    at, n = rng.randrange(len(file.data) or 1), rng.choice((8, 4096, len(file.data)))
    noise = rng.choice((b"\xff" * 8, b"\0\x7c" * 4, b"\0\0\xc0\x7f" * 2, rng.randbytes(8)))
    file.data = (file.data[:at] + (noise * (n // 8 + 1))[:n] + file.data[at + n :])[: len(file.data)]
    return f"data: {n} bytes at {at}"


def change_counts(rng: Draw, file: File) -> str:
    """Numbers at the file's very beginning."""
    file.counts = [rng.choice((0, 1, -1, 2**20, 2**32, 2**63, -100)) for _ in range(2)]
    file.version = rng.choice((0, 1, 2, 3, 3, 3, 4, 2**24, 2**32 - 1))
    return f"counts {file.counts}, version {file.version}"


CHANGES: tuple[tuple[Callable[[Draw, File], str], int], ...] = (
    (change_value, 6), (change_type, 4), (change_array, 4), (change_key, 3), (add_key, 8), (change_token, 5),
    (change_tensor, 8), (change_shape, 3), (change_data, 1), (change_counts, 1),
)  # fmt: skip


def change_bytes(rng: Draw, raw: bytearray, start: int) -> str:
    """Bytes of the header flipped, cut out or put in; the file cut off."""
    how, at = rng.choice(("flip", "flip", "flip", "cut", "put", "end")), rng.randrange(start)
    if how == "flip":
        for place in [at, *(rng.randrange(start) for _ in range(rng.choice((0, 0, 1, 3))))]:
            raw[place] = rng.choice((0, 255, raw[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
    elif how == "cut":
        del raw[at : at + rng.choice((1, 4, 8, 32))]
    elif how == "put":
        raw[at:at] = rng.randbytes(rng.choice((1, 4, 8, 32)))
    else:
        del raw[rng.choice((at, rng.randrange(len(raw)), len(raw) - 1)) :]
    return f"bytes: {how} at {at}"


def mutant(case: str, files: dict[str, File]) -> tuple[str, bytes]:
    """What was changed, and the file, both drawn from the case's name."""
    rng = random.Random(case)
    name = rng.choice(sorted(files))
    file, remarks = files[name].copy(), [name]
    if rng.random() < 0.15:
        raw = bytearray(file.header())
        start = len(raw)
        raw += file.data
        remarks.append(change_bytes(rng, raw, start))
        return "; ".join(remarks), bytes(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choices([c for c, _ in CHANGES], [weight for _, weight in CHANGES])[0]
        remarks.append(change(rng, file))
    return "; ".join(remarks), file.header() + file.data

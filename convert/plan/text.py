"""Canonical text tensors and a vocabulary -> the plan of model.gguf (llama.cpp's architecture `llama`).

Knows names, shapes and keys of the text model, as llama.cpp's own converter writes them
(conversion/llama.py); no types' mixes, no files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf import GGUFValueType as V

from pocketllava.convert.plan.file_plan import FilePlan, PlannedTensor, TensorTaker
from pocketllava.convert.plan.importance import ImportanceMatrix
from pocketllava.convert.plan.quantize import TEXT_TYPES, Mix
from pocketllava.convert.read.checkpoint import Checkpoint
from pocketllava.convert.read.config import TextConfig
from pocketllava.convert.read.sources import SourceTensor
from pocketllava.convert.read.tied import HEAD
from pocketllava.convert.read.vocab import Vocab
from pocketllava.models.gguf_writer import Key

ARCHITECTURE = "llama"
GGML_QNT_VERSION = 2  # ggml.h
BLOCK = (  # canonical name in a layer, GGUF name in a block
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)


def plan_text(
    checkpoint: Checkpoint,
    config: TextConfig,
    vocab: Vocab,
    template: str,
    quant: str,
    dropped: dict[str, str],
    matrix: ImportanceMatrix | None = None,
) -> FilePlan:
    """Map every text tensor. Raises TensorMismatch; records in `dropped` what is left out and why."""
    taker = TensorTaker(checkpoint.tensors, "text")
    if config.tied:
        taker.drop(HEAD, "tied to the token embedding", dropped)
    mix = Mix(quant, config.n_layer, config.n_head // config.n_head_kv, config.tied, matrix is not None)
    tensors = [
        PlannedTensor(name, source.shape, mix.type_of(name, source.shape), source, heads)
        for name, source, heads in _tensors(taker, config)
    ]
    taker.finish(dropped)
    tensors += _computed(config)
    if matrix is not None:
        tensors = [replace(t, importance=matrix.of(t.name, t.shape, t.type)) for t in tensors]
    tensors.sort(key=lambda t: _llama_cpp_order(t.name))
    keys = (
        *_model_keys(checkpoint, config, quant),
        *_vocab_keys(vocab),
        Key("tokenizer.chat_template", template, V.STRING),
        *(matrix.keys() if matrix is not None else ()),
    )
    return FilePlan(ARCHITECTURE, keys, tuple(tensors))


def _tensors(taker: TensorTaker, c: TextConfig) -> Iterator[tuple[str, SourceTensor, int]]:
    """(GGUF name, source, heads to permute). q and k rows are permuted for ggml's rotary embedding."""
    yield "token_embd.weight", taker.take("text.embed_tokens.weight", (c.n_vocab, c.n_embd)), 0
    q, kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    shapes = {
        "attn_norm": (c.n_embd,),
        "attn_q": (q, c.n_embd),
        "attn_k": (kv, c.n_embd),
        "attn_v": (kv, c.n_embd),
        "attn_output": (c.n_embd, q),
        "ffn_norm": (c.n_embd,),
        "ffn_gate": (c.n_ff, c.n_embd),
        "ffn_up": (c.n_ff, c.n_embd),
        "ffn_down": (c.n_embd, c.n_ff),
    }
    heads = {"attn_q": c.n_head, "attn_k": c.n_head_kv}
    for n in range(c.n_layer):
        for hf_name, gguf_name in BLOCK:
            source = taker.take(f"text.layers.{n}.{hf_name}.weight", shapes[gguf_name])
            yield f"blk.{n}.{gguf_name}.weight", source, heads.get(gguf_name, 0)
    yield "output_norm.weight", taker.take("text.norm.weight", (c.n_embd,)), 0
    if not c.tied:
        yield "output.weight", taker.take(HEAD, (c.n_vocab, c.n_embd)), 0


def _computed(c: TextConfig) -> list[PlannedTensor]:
    """Llama 3.1's rope_freqs: what config.json says of frequencies, as a tensor that llama.cpp reads."""
    if not c.rope_factors:
        return []
    name, data = "rope_freqs.weight", np.array(c.rope_factors, "<f4").tobytes()
    source = SourceTensor(name, Path(), 0, len(data), "F32", (len(c.rope_factors),), computed=data)
    return [PlannedTensor(name, source.shape, GGMLQuantizationType.F32, source)]


def _llama_cpp_order(name: str) -> tuple[int, str]:
    """llama.cpp's order: tensors outside blocks first, then by block, then by name (weight_name_comparer)."""
    return (int(name.split(".")[1]) if name.startswith("blk.") else -1, name)


def _model_keys(checkpoint: Checkpoint, c: TextConfig, quant: str) -> list[Key]:
    def u32(name: str, value: int) -> Key:
        return Key(f"{ARCHITECTURE}.{name}", value, V.UINT32)

    def f32(name: str, value: float) -> Key:
        return Key(f"{ARCHITECTURE}.{name}", value, V.FLOAT32)

    keys = [
        Key("general.type", "model", V.STRING),
        Key("general.name", str(checkpoint.identity["id"]), V.STRING),
        u32("block_count", c.n_layer),
        u32("context_length", c.n_ctx),
        u32("embedding_length", c.n_embd),
        u32("feed_forward_length", c.n_ff),
        u32("attention.head_count", c.n_head),
        u32("attention.head_count_kv", c.n_head_kv),
        f32("rope.freq_base", c.rope_theta),
        f32("attention.layer_norm_rms_epsilon", c.rms_eps),
        u32("attention.key_length", c.head_dim),
        u32("attention.value_length", c.head_dim),
        Key("general.file_type", int(TEXT_TYPES[quant][1]), V.UINT32),
        u32("vocab_size", c.n_vocab),
        u32("rope.dimension_count", c.head_dim),
        Key("general.quantization_version", GGML_QNT_VERSION, V.UINT32),
    ]
    if c.rope_scale != 1.0:
        keys += [
            Key(f"{ARCHITECTURE}.rope.scaling.type", "linear", V.STRING),
            f32("rope.scaling.factor", c.rope_scale),
        ]
    return keys


def _vocab_keys(vocab: Vocab) -> list[Key]:
    def key(name: str, value: Any, kind: V, item: V | None = None) -> Key:
        return Key(f"tokenizer.ggml.{name}", value, kind, item)

    keys = [
        key("model", "gpt2" if vocab.merges else "llama", V.STRING),
        key("pre", vocab.pre, V.STRING),
        key("tokens", vocab.tokens, V.ARRAY, V.STRING),
        *([] if vocab.merges else [key("scores", vocab.scores, V.ARRAY, V.FLOAT32)]),
        key("token_type", vocab.types, V.ARRAY, V.INT32),
        *([key("merges", vocab.merges, V.ARRAY, V.STRING)] if vocab.merges else []),
        key("bos_token_id", vocab.bos_id, V.UINT32),
        key("eos_token_id", vocab.eos_id, V.UINT32),
        *([] if vocab.merges else [key("unknown_token_id", vocab.unk_id, V.UINT32)]),
        key("add_bos_token", vocab.add_bos, V.BOOL),
        key("add_eos_token", False, V.BOOL),
        key("add_space_prefix", vocab.space_prefix != "none", V.BOOL),
    ]
    return keys + ([key("padding_token_id", vocab.pad_id, V.UINT32)] if vocab.pad_id is not None else [])

"""Whether a GGUF file is a text model of architecture `llama` that libllama loads: keys, vocabulary, tensors.

libllama asserts, throws through C, or reads past an array's end on much of what can be wrong with a file, which
ends the process; so nothing is handed to it that was not checked here. Follows llama.cpp's load_hparams,
load_arch_tensors, llama_vocab::impl::load and gguf_init_from_reader as llama-cpp-python 0.3.36 carries them.
Knows headers, no engine, no tensor data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pocketllava.errors import BundleError
from pocketllava.models.contract import (
    BOOL,
    FLOAT,
    GENERAL,
    I32,
    MAX_LAYERS,
    TEXT,
    TYPE_NAMES,
    U16,
    U32,
    ExpectedTensor,
    Rule,
    check_key,
    check_layout,
    check_names,
    check_tensors,
    fault,
    flag,
    only,
    shown,
)
from pocketllava.models.gguf_header import ARRAY, Header

F32 = 0  # enum ggml_type
# Every type that ggml's CPU code can look rows up in and multiply with.
MATRIX_TYPES = (0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19, 20, 21, 22, 23, 29, 30, 34, 35, 39)
MAX_CONTEXT = 1 << 24  # llama_cpp allocates so many ids for each text that it tokenizes
MAX_TEMPLATE = 1 << 17  # characters; llama_cpp compiles each one when it loads a file
MAX_TOKEN = 1024  # characters; Llama 3's longest has 128
MAX_DECODED = 1 << 26  # libllama writes a whole token out once for each of its characters that is no byte's
# What files of early 2024 have that name none; it runs in std::regex too, so runs are bounded where text comes in. The
# stack is 8 MB, and 1 MB or less in threads and on Windows: 322 bytes a character.
DEFAULT_PRE = "default"
MAX_RUN = 1000  # characters
N_DEFAULT_IDS = 12  # libllama's own bos and eos lie below
CONTROL_TOKENS_OF_PHI3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")
BYTE_TOKEN = 6  # llama.h, LLAMA_TOKEN_TYPE_BYTE
BYTE_TEXTS = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Those of llama_vocab::impl::load whose regex libllama has written out in C++. The others run in std::regex, which
# overflows the stack (SIGSEGV) on some 26,000 letters, digits or signs in a row, as these 53 did not on 200,000.
# GLM's have no BOS, which aborts.
PRE_TOKENIZERS = (
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano mpt starcoder "
    "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert gemma4 "
    "granite-embed-multi-311m sarvam-moe jina-v1-en jina-v2-code roberta-bpe refact command-r qwen2 deepseek-r1-qwen "
    "kormo f2llmv2 qwen35 stablelm2 olmo dbrx smaug-bpe jais smollm codeshell exaone exaone4 chameleon "
    "minerva-7b megrez trillion granite-docling hunyuan kimi-k2 grok-2 laguna solar-open mellum2"
)


@dataclass(frozen=True)
class TextInfo:
    """The shape of a text model, as its file says."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_size: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rope_freq_base: float
    rope_scaling: str
    tokenizer: str
    tied: bool


def _size(required: bool = False) -> Rule:
    return Rule(U32, "a number from 1 to 2147483647", lambda n: 0 < n < 1 << 31, required)


def _factor(required: bool = False) -> Rule:
    return Rule(FLOAT, "a finite number, 0 or more", lambda x: 0 <= x < math.inf, required)


RULES: dict[str, Rule] = {
    **GENERAL,
    "split.count": Rule(U16, "one file, not a part of several", lambda n: n <= 1),
    "llama.context_length": Rule(U32, f"1 to {MAX_CONTEXT}", lambda n: 0 < n <= MAX_CONTEXT, required=True),
    "llama.embedding_length": _size(required=True),
    "llama.block_count": Rule(U32, f"1 to {MAX_LAYERS}", lambda n: 0 < n <= MAX_LAYERS, required=True),
    "llama.vocab_size": Rule(U32, "a number"),
    "llama.attention.layer_norm_rms_epsilon": Rule(
        FLOAT, "a small positive number", lambda x: 0 < x < 1, required=True
    ),
    "llama.attention.key_length": _size(),
    "llama.attention.value_length": _size(),
    "llama.attention.key_length_swa": _size(),
    "llama.attention.value_length_swa": _size(),
    "llama.rope.dimension_count": _size(),
    "llama.rope.dimension_count_swa": _size(),
    "llama.rope.freq_base": Rule(FLOAT, "a positive number", lambda x: 0 < x < math.inf),
    "llama.rope.scale_linear": _factor(),
    "llama.rope.scaling.type": Rule(
        TEXT, "none, linear, yarn or longrope", lambda t: t in ("none", "linear", "yarn", "longrope")
    ),
    "llama.rope.scaling.factor": _factor(),
    "llama.rope.scaling.attn_factor": _factor(),
    "llama.rope.scaling.alpha": _factor(),
    "llama.rope.scaling.original_context_length": _size(),
    "llama.rope.scaling.finetuned": flag(),
    # What would make it another kind of model: experts, an encoder, a classifier, a draft model.
    "llama.expert_count": only(U32, 0),
    "llama.expert_used_count": only(U32, 0),
    "llama.expert_group_count": only(U32, 0),
    "llama.expert_group_used_count": only(U32, 0),
    "llama.nextn_predict_layers": only(U32, 0),
    "llama.attention.causal": only(BOOL, True),
    "llama.pooling_type": only(U32, 0),
    "llama.classifier.pooling_type": only(U32, 0),
    "llama.classifier.output_labels": Rule(ARRAY, "no such key", lambda _labels: False),
    "llama.embedding_length_out": _size(),
    "tokenizer.ggml.model": Rule(TEXT, "llama or gpt2", lambda t: t in ("llama", "gpt2"), required=True),
    "tokenizer.ggml.pre": Rule(TEXT, "text"),
    "tokenizer.ggml.token_type_count": Rule(U32, "a number"),
    **{
        f"tokenizer.ggml.{name}": flag()
        for name in (
            "add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces",
            "normalizer.lowercase", "normalizer.strip_accents",
        )
    },
}  # fmt: skip
TEMPLATE = Rule(TEXT, f"at most {MAX_TEMPLATE} characters", lambda t: len(t) <= MAX_TEMPLATE)
TOKEN_IDS = tuple(
    f"tokenizer.ggml.{name}_token_id"
    for name in (
        "bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "fim_pre", "fim_suf", "fim_mid",
        "fim_pad", "fim_rep", "fim_sep", "prefix", "suffix", "middle",
    )
)  # fmt: skip


def check_text(header: Header) -> TextInfo:
    """Check the whole contract. Raises BundleError naming the file, what was found and what was expected."""
    _check_kind(header)
    for name, rule in RULES.items():
        check_key(header, name, rule)
    info = _shape(header, _check_vocabulary(header))
    check_tensors(header, _expected(info), f"{info.n_layer} blocks of `llama`")
    check_layout(header)
    return info


def _check_kind(header: Header) -> None:
    architecture = header.keys.get("general.architecture")
    if architecture != "llama" or header.key_types["general.architecture"] != TEXT:
        kind = (
            "an mmproj, not a text model" if architecture == "clip" else "not a text model of LLaVA's kinds"
        )
        raise BundleError(
            f"{header.path}: found a GGUF file of architecture {shown(architecture)}, expected 'llama'; it is {kind}"
        )
    check_names(header)
    for name in header.keys:
        if f"{name}.".startswith("tokenizer.chat_template."):
            check_key(header, name, TEMPLATE)


def _check_array(
    header: Header, name: str, item_types: tuple[int, ...], length: int | None = None
) -> list[Any] | None:
    """The array's items; None where the file has no such key."""
    if name not in header.keys:
        return None
    value, kind, item = header.keys[name], header.key_types[name], header.item_types.get(name)
    if kind != ARRAY or item not in item_types:
        found = TYPE_NAMES[kind] if item is None else f"array of {TYPE_NAMES[item]}"
        expected = " or ".join(TYPE_NAMES[t] for t in item_types)
        raise fault(header, f"key {name} is {shown(value)} ({found})", f"an array of {expected}")
    if length is not None and len(value) != length:
        raise fault(header, f"key {name} has {len(value)} items", f"{length}")
    return list(value)


def _shape(header: Header, n_vocab: int) -> TextInfo:
    keys, prefix = header.keys, "llama.attention."
    n_layer, n_embd = keys["llama.block_count"], keys["llama.embedding_length"]
    n_head = _same_in_all(header, prefix + "head_count", n_layer)
    n_head_kv = _same_in_all(header, prefix + "head_count_kv", n_layer, n_head)
    head_size = keys.get(prefix + "key_length", n_embd // n_head)
    if n_head % n_head_kv:
        raise fault(header, f"{n_head} heads share {n_head_kv} of keys", "a divisor of the number of heads")
    for name, default, expected in (
        (prefix + "value_length", n_embd // n_head, head_size),
        ("llama.rope.dimension_count", head_size, head_size),
        ("llama.embedding_length_out", n_embd, n_embd),
    ):
        if (size := keys.get(name, default)) != expected:
            raise fault(header, f"key {name} is {size}", f"{expected}")
    if not head_size or head_size % 2:
        raise fault(header, f"{n_head} heads of size {head_size}", "an even size, since RoPE turns pairs")
    return TextInfo(
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_size=head_size,
        n_ff=_same_in_all(header, "llama.feed_forward_length", n_layer),
        n_vocab=n_vocab,
        n_ctx_train=keys["llama.context_length"],
        rope_freq_base=keys.get("llama.rope.freq_base", 10000.0),
        rope_scaling=keys.get("llama.rope.scaling.type", "linear"),
        tokenizer=keys["tokenizer.ggml.model"],
        tied="output.weight" not in header.tensors,
    )


def _same_in_all(header: Header, name: str, n_layer: int, default: int | None = None) -> int:
    """A size that may be given for each layer; libllama builds `llama` graphs with the first layer's."""
    if name not in header.keys and default is not None:
        return default
    if header.key_types.get(name) != ARRAY:
        check_key(header, name, _size(required=True))
        return int(header.keys[name])
    sizes = _check_array(header, name, (U32, I32), n_layer) or []
    if len(set(sizes)) != 1 or not 0 < sizes[0] < 1 << 31:
        raise fault(header, f"key {name} is {shown(sizes)}", "one positive number for all layers")
    return int(sizes[0])


def _check_vocabulary(header: Header) -> int:
    """The number of tokens."""
    keys, prefix = header.keys, "tokenizer.ggml."
    tokens = _check_array(header, prefix + "tokens", (TEXT,))
    if not tokens or len(tokens) < N_DEFAULT_IDS:
        raise fault(header, f"key {prefix}tokens has {len(tokens or ())} tokens", f"{N_DEFAULT_IDS} or more")
    n_vocab = len(tokens)
    scores = _check_array(header, prefix + "scores", (FLOAT, I32), n_vocab)
    types = _check_array(header, prefix + "token_type", (I32,), n_vocab)
    _check_array(header, prefix + "suppress_tokens", (I32,))
    if scores and not math.isfinite(sum(scores)):
        raise fault(header, f"key {prefix}scores holds NaN or an infinity", "finite numbers")
    texts = _check_texts(header, tokens)
    _check_bytes(header, tokens, types or [])
    if keys[prefix + "model"] == "llama":
        _check_spm(header, texts, scores)
    else:
        _check_bpe(header, tokens)
    if "phi-3" in (name := str(keys.get("general.name", "")).lower()) or "phi3" in name:
        _check_present(header, texts, CONTROL_TOKENS_OF_PHI3)
    for name in TOKEN_IDS:
        check_key(header, name, Rule(U32, f"one of {n_vocab} tokens' ids", lambda n: n < n_vocab))
    return n_vocab


def _check_texts(header: Header, tokens: list[str]) -> set[str]:
    """Every token's text as libllama keeps it; it asserts that all differ."""
    texts = set(tokens)
    if "" in texts:
        tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        texts = set(tokens)
    if len(texts) != len(tokens):
        double = Counter(tokens).most_common(1)[0][0]
        raise fault(header, f"token {shown(double)} is there twice", "tokens that differ")
    if max(map(len, tokens)) > MAX_TOKEN:
        raise fault(header, f"a token has {max(map(len, tokens))} characters", f"at most {MAX_TOKEN}")
    if "\0" in "".join(tokens):
        raise fault(header, "a token holds a zero byte, where C ends it", "text")
    return texts


def _check_bytes(header: Header, tokens: list[str], types: list[int]) -> None:
    """libllama reads a byte's value from the fourth and fifth character."""
    for text in [text for text, kind in zip(tokens, types, strict=False) if kind == BYTE_TOKEN]:
        if len(text) != len(BYTE_TEXTS[0]):
            raise fault(header, f"token {shown(text)} is of type {BYTE_TOKEN}, a byte", f"{BYTE_TEXTS[0]!r}")


def _check_spm(header: Header, texts: set[str], scores: list[Any] | None) -> None:
    """A character that is no token becomes bytes; where a byte is none either, an exception crosses C."""
    if scores is None:
        raise fault(header, "key tokenizer.ggml.scores is missing", "a score for each token")
    _check_present(
        header, texts, [t for b, t in enumerate(BYTE_TEXTS) if not 0 < b < 128 or chr(b) not in texts]
    )


def _check_present(header: Header, texts: set[str], needed: list[str] | tuple[str, ...]) -> None:
    for text in needed:
        if text not in texts:
            raise fault(header, f"token {text!r} is missing", f"{', '.join(needed[:3])} and so on")


def _check_bpe(header: Header, tokens: list[str]) -> None:
    if _check_array(header, "tokenizer.ggml.merges", (TEXT,)) is None:
        raise fault(header, "key tokenizer.ggml.merges is missing", "an array of string")
    check_key(header, "tokenizer.ggml.pre", Rule(TEXT, "one that splits safely, such as llama-bpe", _known))
    if (decoded := sum(n * n for n in map(len, tokens))) > MAX_DECODED:
        raise fault(header, f"tokens are so long that they may take {decoded} characters", f"{MAX_DECODED}")


def _known(pre: str) -> bool:
    return pre in ("", DEFAULT_PRE) or is_unbounded(pre)


def is_unbounded(pre: str) -> bool:
    """Whether a pre-tokenizer takes runs of any length; the others take MAX_RUN characters of one kind."""
    return pre in PRE_TOKENIZERS.split()


def _expected(info: TextInfo) -> Iterator[ExpectedTensor]:
    """Name, shape (rows first), types, and whether it must be there, of every tensor that libllama reads."""
    width, wide, turned = info.n_embd, info.n_ff, (info.head_size // 2,)
    q, kv = info.n_head * info.head_size, info.n_head_kv * info.head_size
    vector: tuple[int, ...] = (F32,)
    yield "token_embd.weight", (info.n_vocab, width), MATRIX_TYPES, True
    yield "output_norm.weight", (width,), vector, True
    yield "output.weight", (info.n_vocab, width), MATRIX_TYPES, False
    long = info.rope_scaling == "longrope"
    for name in ("rope_factors_long", "rope_factors_short") if long else ("rope_freqs",):
        yield f"{name}.weight", turned, vector, False
    for block in range(info.n_layer):
        for norm in ("attn_norm", "ffn_norm"):
            yield f"blk.{block}.{norm}.weight", (width,), vector, True
        for name, rows, columns in (
            ("attn_q", q, width),
            ("attn_k", kv, width),
            ("attn_v", kv, width),
            ("attn_output", width, q),
            ("ffn_gate", wide, width),
            ("ffn_down", width, wide),
            ("ffn_up", wide, width),
        ):
            yield f"blk.{block}.{name}.weight", (rows, columns), MATRIX_TYPES, True
            yield f"blk.{block}.{name}.bias", (rows,), vector, False

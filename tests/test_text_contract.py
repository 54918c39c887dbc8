"""Text models that libllama would abort on are refused by name; those that people publish are not.

attack/gguf_files.py takes as many damaged files as one likes through every way in (20,000 were run by hand).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import variants
from attack import gguf_files as attack
from attack.gguf_mutants import File, Tensor
from test_imatrix import llama_quantize, made_up
from test_original import LAYOUTS as ORIGINAL
from test_quantize import LAYOUTS as SHAPES
from test_quantize import model_file

from pocketllava import Bundle, BundleError, InputError
from pocketllava.llamacpp.devices import gpus
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.models.gguf_header import ARRAY, STRING, Header
from pocketllava.models.text_contract import MATRIX_TYPES, MAX_RUN, check_text

U16, U32, I32, FLOAT, BOOL = 2, 4, 5, 6, 7
COMPILES_S = 900.0  # the shaders of one type, on a software GPU
LAYOUTS = {
    **variants.LAYOUTS,
    **ORIGINAL,
    **SHAPES,
    "two files": {"shards": 2},
    "new names": {"naming": "new"},
}
# Keys of files that people publish, beside the sizes, as their listings show them.
PUBLISHED: dict[str, dict[str, tuple[int, Any]]] = {
    "llama.cpp's first converter": {
        "general.name": (STRING, "LLaMA v2"),
        "tokenizer.ggml.unknown_token_id": (U32, 0),
    },
    "llava-v1.6-mistral": {
        "general.name": (STRING, "1.6"),
        "llama.rope.freq_base": (FLOAT, 1e6),
        "llama.context_length": (U32, 32768),
        "tokenizer.ggml.padding_token_id": (U32, 0),
        "tokenizer.ggml.add_bos_token": (BOOL, True),
        "tokenizer.ggml.add_eos_token": (BOOL, False),
        "tokenizer.chat_template": (STRING, "{{ bos_token }}{% for message in messages %}{% endfor %}"),
        "tokenizer.ggml.merges": (ARRAY, ["▁ t", "i n"]),  # TinyLlama's too: beside SentencePiece's scores
    },
    "importance matrix, many general keys": {
        "general.type": (STRING, "model"),
        "general.basename": (STRING, "llava"),
        "general.size_label": (STRING, "7B"),
        "general.license.link": (STRING, "https://example.org"),
        "general.base_model.count": (U32, 1),
        "general.base_model.0.name": (STRING, "Vicuna 7b"),
        "general.tags": (ARRAY, ["vision", "image-text-to-text"]),
        "general.languages": (ARRAY, ["en"]),
        "general.sampling.top_k": (I32, 64),
        "quantize.imatrix.file": (STRING, "imatrix.dat"),
        "quantize.imatrix.dataset": (STRING, "calibration_datav3.txt"),
        "quantize.imatrix.entries_count": (I32, 224),
        "quantize.imatrix.chunks_count": (I32, 125),
    },
    "one part of one, and what other programs add": {
        "split.no": (U16, 0),
        "split.count": (U16, 1),
        "split.tensors.count": (I32, 12),
        "llama.tensor_data_layout": (STRING, "Meta AI original pth"),
        "llama.expert_count": (U32, 0),
        "llama.attention.key_length": (U32, 64),
        "llama.attention.value_length": (U32, 64),
        "llama.rope.scaling.type": (STRING, "linear"),
        "llama.rope.scaling.factor": (FLOAT, 4.0),
        "llama.rope.scaling.original_context_length": (U32, 4096),
        "tokenizer.chat_template.tool_use": (STRING, "{{ bos_token }}"),
        "tokenizer.chat_templates": (ARRAY, ["tool_use"]),
        "tokenizer.ggml.add_space_prefix": (BOOL, True),
        "company.note": (7, True),
    },
}


@pytest.fixture(scope="module")
def small(attacked: Path) -> dict[str, Path]:
    """The models that the attack damages."""
    return {name: attacked / name / "model.gguf" for name in attack.LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_what_the_converter_writes_passes(
    make_checkpoint: Any, tmp_path: Path, layout: dict[str, Any]
) -> None:
    info = check_text(model_file(make_checkpoint(**layout), "Q8_0", tmp_path / "model.gguf"))
    assert (info.n_layer, info.n_head_kv) == (layout.get("layers", 4), layout.get("kv_heads", 4))
    assert (info.n_embd, info.n_head, info.head_size, info.n_ff) == (256, 4, 64, layout.get("ffn", 512))
    assert (info.tokenizer == "gpt2", info.tied) == (layout.get("llama3", False), layout.get("tied", False))


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q5_1", "IQ4_XS", "IQ2_XXS", "IQ3_M"])
def test_what_llama_cpp_quantizes_passes(make_checkpoint: Any, tmp_path: Path, quant: str) -> None:
    half = model_file(make_checkpoint(layers=1, ffn=256), "F16", tmp_path / "f16.gguf")
    matrix = made_up(half, tmp_path / "matrix.gguf")
    header = llama_quantize(half.path, quant, tmp_path / "q.gguf", matrix)
    assert check_text(header) == check_text(half)


@pytest.mark.parametrize("keys", PUBLISHED.values(), ids=list(PUBLISHED))
def test_published_keys_pass(small: dict[str, Path], keys: dict[str, tuple[int, Any]]) -> None:
    header = Header.read(small["llama"])
    optional = {n for n in header.keys if n.startswith(("general.", "tokenizer.ggml.add_", "llama.vocab"))}
    kept = {n: v for n, v in header.keys.items() if n not in optional - {"general.architecture"}}
    items = {name: STRING for name, (kind, _) in keys.items() if kind == ARRAY}
    info = check_text(
        replace(
            header,
            keys=kept | {name: value for name, (_, value) in keys.items()},
            key_types=header.key_types | {name: kind for name, (kind, _) in keys.items()},
            item_types=header.item_types | items,
        )
    )
    assert info.n_vocab == len(header.keys["tokenizer.ggml.tokens"])


Change = Callable[[File], None]


def key(name: str, value: Any, kind: int | None = None, item: int | None = None) -> Change:
    """A key with another value, or a new one; kind and item as they are unless given."""

    def change(file: File) -> None:
        old = next((k for k in file.keys if k[0] == name), (name, U32, None, U32))
        new = (name, old[1] if kind is None else kind, value, old[3] if item is None else item)
        file.keys = [new if k is old else k for k in file.keys] + ([] if old in file.keys else [new])

    return change


def no_key(name: str) -> Change:
    """The file without a key."""

    def change(file: File) -> None:
        file.keys = [k for k in file.keys if k[0] != name]

    return change


def item(name: str, edit: Callable[[list[Any]], object]) -> Change:
    """An array's items edited in place."""
    return lambda file: edit(next(k[2] for k in file.keys if k[0] == name)) and None


def tensor(name: str, **values: Any) -> Change:
    """A tensor listed with another shape, type, name or offset, and data to match unless it is the offset."""

    def change(file: File) -> None:
        for attribute, value in values.items():
            setattr(next(t for t in file.tensors if t.name == name), attribute, value)
        if "offset" not in values:
            file.lay_out()

    return change


def no_tensor(name: str) -> Change:
    """The file without a tensor."""

    def change(file: File) -> None:
        file.tensors = [t for t in file.tensors if t.name != name]
        file.lay_out()

    return change


def extra(name: str, dims: list[int]) -> Change:
    """A tensor more."""

    def change(file: File) -> None:
        file.tensors.append(Tensor(name, dims, 0, 0))
        file.lay_out()

    return change


TOKENS, SCORES, TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
HEADS, HEADS_KV, FFN = (
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.feed_forward_length",
)
Q = "blk.0.attn_q.weight"
FAULTS: list[tuple[str, Change, str]] = [
    ("llama", key("general.architecture", "clip"), "architecture 'clip', expected 'llama'; it is an mmproj"),
    ("llama", key("general.architecture", "qwen2"), "architecture 'qwen2', expected 'llama'"),
    ("llama", no_key("general.architecture"), "architecture None, expected 'llama'"),
    ("llama", key("general.name", 1, U32), r"general.name is 1 \(uint32\), expected text \(string\)"),
    ("llama", key("general.name", ["x"], ARRAY, STRING), r"general.name is \['x'\] \(array\)"),
    ("llama", key("general.name", "LLaVA-Phi-3-mini"), "token '<|endoftext|>' is missing"),
    ("llama", key("general.alignment", 32, 10), r"general.alignment is 32 \(uint64\), expected .* \(uint32\)"),
    ("llama", key("general.alignment", 8, U32), "general.alignment is 8 .* expected 32 or a larger"),
    ("llama", key("general.alignment", 16, U32), "general.alignment is 16"),
    ("llama", key("general.file_type", "F16", STRING), r"general.file_type is 'F16' \(string\)"),
    ("llama", key("general.name\0x", 1), r"a key is named 'general.name\\x00x'"),
    ("llama", key("split.count", 2, U16), "split.count is 2 .* expected one file"),
    ("llama", key("split.count", 1, U32), r"split.count is 1 \(uint32\), expected .* \(uint16\)"),
    ("llama", no_key("llama.context_length"), "key llama.context_length is missing, expected 1 to"),
    ("llama", key("llama.context_length", 2**31 - 1), "llama.context_length is 2147483647"),
    ("llama", key("llama.context_length", 4096, I32), r"is 4096 \(int32\), expected 1 to 16777216 \(uint32\)"),
    ("llama", key("llama.block_count", 0), "block_count is 0 .* expected 1 to 512"),
    ("llama", key("llama.block_count", 513), "block_count is 513"),
    ("llama", key("llama.block_count", 2**32 - 1), "block_count is 4294967295"),
    ("llama", key("llama.block_count", 512), "tensor 'blk.1.attn_norm.weight' is missing"),
    ("grouped", key("llama.block_count", 1), "tensor 'blk.1.attn_k.weight' is unexpected"),
    ("llama", key("llama.embedding_length", 0), "embedding_length is 0"),
    ("llama", key("llama.embedding_length", 512), "'token_embd.weight' has shape"),
    ("llama", no_key(HEADS), "key llama.attention.head_count is missing"),
    ("llama", key(HEADS, 0), "head_count is 0"),
    ("llama", key(HEADS_KV, 0), "head_count_kv is 0"),
    ("llama", key(HEADS_KV, 3), "4 heads share 3"),
    ("grouped", key(HEADS, [4, 2], ARRAY, U32), r"head_count is \[4, 2\], expected one positive number"),
    ("grouped", key(HEADS, [4], ARRAY, U32), "head_count has 1 items, expected 2"),
    ("grouped", key(FFN, [256.0] * 2, ARRAY, FLOAT), "feed_forward_length is .* expected an array of uint32 or int32"),
    ("grouped", key(FFN, [-1, -1], ARRAY, I32), r"feed_forward_length is \[-1, -1\]"),
    ("llama", key("llama.attention.key_length", 32), "value_length is 64, expected 32"),
    ("llama", key("llama.attention.value_length", 32), "value_length is 32, expected 64"),
    ("llama", key("llama.rope.dimension_count", 32), "dimension_count is 32, expected 64"),
    ("llama", no_key("llama.attention.layer_norm_rms_epsilon"), "layer_norm_rms_epsilon is missing"),
    ("llama", key("llama.attention.layer_norm_rms_epsilon", -1e-5), "expected a small positive number"),
    ("llama", key("llama.attention.layer_norm_rms_epsilon", float("nan")), "is nan"),
    ("llama", key("llama.rope.freq_base", 0.0, FLOAT), "freq_base is 0.0"),
    ("llama", key("llama.rope.scaling.type", "su", STRING), "scaling.type is 'su' .* expected none, linear, yarn"),
    ("llama", key("llama.rope.scaling.factor", float("inf"), FLOAT), "factor is inf"),
    ("llama", key("llama.expert_count", 8), "expert_count is 8 .* expected 0 or no such key"),
    ("llama", key("llama.expert_used_count", 2), "expert_used_count is 2"),
    ("llama", key("llama.expert_group_count", 1), "expert_group_count is 1"),
    ("llama", key("llama.nextn_predict_layers", 1), "nextn_predict_layers is 1"),
    ("llama", key("llama.attention.causal", False, BOOL), "causal is False"),
    ("llama", key("llama.classifier.output_labels", ["a"], ARRAY, STRING), "output_labels is .* expected no such key"),
    ("llama", key("llama.embedding_length_out", 8), "embedding_length_out is 8, expected 256"),
    ("llama", no_key("tokenizer.ggml.model"), "tokenizer.ggml.model is missing"),
    ("llama", key("tokenizer.ggml.model", "bert"), "tokenizer.ggml.model is 'bert' .* expected llama or gpt2"),
    ("llama", key("tokenizer.ggml.pre", 1, U32), r"tokenizer.ggml.pre is 1 \(uint32\)"),
    ("llama3", key("tokenizer.ggml.pre", "nobody's"), "pre is \"nobody's\" .* expected one that splits safely"),
    ("llama3", key("tokenizer.ggml.pre", "tekken"), "pre is 'tekken' .* expected one that splits safely"),
    ("llama3", key("tokenizer.ggml.pre", "chatglm-bpe"), "pre is 'chatglm-bpe'"),
    ("llama3", no_key("tokenizer.ggml.merges"), "tokenizer.ggml.merges is missing"),
    ("llama3", key("tokenizer.ggml.merges", [1], ARRAY, I32), r"merges is \[1\] \(array of int32\), expected an array of string"),
    ("llama", no_key(TOKENS), "tokens has 0 tokens"),
    ("llama", key(TOKENS, [1, 2], ARRAY, I32), "tokens is .* expected an array of string"),
    ("llama", item(TOKENS, list.pop), "scores has 704 items, expected 703"),
    ("llama", item(SCORES, list.pop), "scores has 703 items, expected 704"),
    ("llama", item(TYPES, list.pop), "token_type has 703 items, expected 704"),
    ("llama", key(TYPES, [1.0] * 704, ARRAY, FLOAT), "token_type is .* expected an array of int32"),
    ("llama", no_key(SCORES), "scores is missing"),
    ("llama", item(SCORES, lambda v: v.__setitem__(9, float("nan"))), "scores holds NaN"),
    ("llama", item(TOKENS, lambda v: v.__setitem__(500, v[501])), "is there twice"),
    ("llama3", item(TOKENS, lambda v: v.__setitem__(slice(5, 8), ["", "x y", "[EMPTY_5]"])), "is there twice"),
    ("llama", item(TOKENS, lambda v: v.__setitem__(600, "a\0b")), "holds a zero byte"),
    ("llama", item(TOKENS, lambda v: v.__setitem__(600, "a" * 1025)), "a token has 1025 characters"),
    ("llama", item(TOKENS, lambda v: v.__setitem__(v.index("<0x0A>"), "newline")), "'newline' is of type 6, a byte"),
    ("llama", item(TYPES, lambda v: v.__setitem__(600, 6)), "is of type 6, a byte"),
    ("llama3", item(TOKENS, lambda v: v.__setitem__(slice(99), [f"{i:03}" + "日" * 999 for i in range(99)])), "are so long"),
    ("llama", key("tokenizer.ggml.eos_token_id", 704), "eos_token_id is 704 .* expected one of 704 tokens' ids"),
    ("llama", key("tokenizer.ggml.eos_token_id", 2, I32), r"eos_token_id is 2 \(int32\)"),
    ("llama", key("tokenizer.ggml.add_bos_token", 1, U32), r"add_bos_token is 1 \(uint32\), expected true or false"),
    ("llama", key("tokenizer.ggml.suppress_tokens", 1), "suppress_tokens is 1"),
    ("llama", key("tokenizer.chat_template", "x" * (1 << 18), STRING), "expected at most 131072 characters"),
    ("llama", no_tensor(Q), f"tensor '{Q}' is missing"),
    ("llama", no_tensor("output_norm.weight"), "tensor 'output_norm.weight' is missing"),
    ("llama", extra("blk.0.attn_qkv.weight", [256, 768]), "'blk.0.attn_qkv.weight' is unexpected"),
    ("llama", tensor(Q, dims=[512, 256]), r"has shape \[256, 512\] and type 12, expected \[256, 256\]"),
    ("llama", tensor(Q, dims=[256]), r"has shape \[256\]"),
    ("llama", tensor(Q, type=26), "has shape .* and type 26"),
    ("llama", tensor("blk.0.attn_norm.weight", type=1), "and type 1, expected .* type 0"),
    ("llama3", tensor("rope_freqs.weight", dims=[64]), r"'rope_freqs.weight' has shape \[64\].* expected \[32\]"),
    ("llama3", key("llama.rope.scaling.type", "longrope", STRING), "'rope_freqs.weight' is unexpected"),
    ("llama", tensor(Q, offset=0), "lies at 0, expected"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "change", "message"), FAULTS, ids=[message for *_, message in FAULTS])
def test_single_faults(
    small: dict[str, Path], tmp_path: Path, model: str, change: Change, message: str
) -> None:
    file, path = File.read(small[model]), tmp_path / "faulty.gguf"
    change(file)
    path.write_bytes(file.header() + file.data)
    with pytest.raises(BundleError, match=message) as caught:
        check_text(Header.read(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_per_layer_sizes_that_are_equal_pass(small: dict[str, Path], tmp_path: Path) -> None:
    file, path = File.read(small["grouped"]), tmp_path / "arrays.gguf"
    for name, size in ((HEADS, 4), (HEADS_KV, 2), (FFN, 256)):
        key(name, [size, size], ARRAY, I32)(file)
    path.write_bytes(file.header() + file.data)
    assert check_text(Header.read(path)) == check_text(Header.read(small["grouped"]))
    attack.use(path)


def test_every_accepted_type_is_one_that_llama_cpp_computes_with(
    small: dict[str, Path], tmp_path: Path
) -> None:
    child = attack.Child(COMPILES_S if gpus() else attack.USE_S)
    try:
        for kind in MATRIX_TYPES:
            file, path = File.read(small["grouped"]), tmp_path / f"{kind}.gguf"
            for t in file.tensors:
                t.type = kind if len(t.dims) == 2 else t.type
            file.lay_out()
            path.write_bytes(file.header() + file.data)
            assert attack.refused(path) == ""
            assert child.use(path) == "accepted", kind
    finally:
        child.close()


@pytest.mark.parametrize(
    ("model", "pre"), [("llama", "default"), ("llama3", "llama-bpe"), ("llama3", "smaug-bpe")]
)
def test_long_runs_of_one_character_tokenize(
    small: dict[str, Path], tmp_path: Path, model: str, pre: str
) -> None:
    file, path, child = File.read(small[model]), tmp_path / "long" / "x.gguf", attack.Child()
    path.parent.mkdir()
    key("tokenizer.ggml.pre", pre, STRING)(file)
    path.write_bytes(file.header() + file.data)
    try:
        assert attack.refused(path) == ""
        assert child.use(path) == "accepted"
    finally:
        child.close()


def test_without_a_pre_tokenizer_long_runs_are_refused(small: dict[str, Path], tmp_path: Path) -> None:
    """Files of early 2024 name none; libllama then uses std::regex, which 26,000 letters in a row overflow."""
    for n, change in enumerate((key("tokenizer.ggml.pre", "default", STRING), no_key("tokenizer.ggml.pre"))):
        file, path = File.read(small["llama3"]), tmp_path / f"{n}.gguf"
        change(file)
        path.write_bytes(file.header() + file.data)
        assert attack.refused(path) == ""
        model, _ = TextModel.load(path, n_ctx=256, n_threads=1)
        for run in ("a", "1", "日", "!", "_", "é"):
            assert model.tokenize("x " + run * MAX_RUN)
            with pytest.raises(InputError, match=r"found 5000 letters, digits, signs or spaces in a row"):
                model.tokenize("x y " + run * 5000)
        assert model.tokenize("It's a b'll 12 " * 9000)
        model.close()


def test_the_check_stands_before_llama_cpp(bundle: Bundle, tmp_path: Path) -> None:
    file, path = File.read(bundle.model), tmp_path / "model.gguf"
    item(TOKENS, lambda v: v.__setitem__(500, v[501]))(file)
    path.write_bytes(file.header() + file.data)
    with pytest.raises(BundleError, match="is there twice"):
        TextModel.load(path, n_ctx=256)

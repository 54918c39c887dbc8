"""mmproj files that libmtmd would abort on or misread are refused by name; those that people publish are not."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attack.gguf_mutants import File
from test_repair import hub_file
from test_text_contract import Change, extra, key, no_key, no_tensor, tensor

from pocketllava import Bundle, BundleError, ConvertError
from pocketllava.convert.repair import examine, repair
from pocketllava.convert.requantize import requantize
from pocketllava.models.gguf_header import ARRAY, STRING, Header
from pocketllava.models.mmproj_contract import check_mmproj

U32, I32, FLOAT, BOOL, U64 = 4, 5, 6, 7, 10
V = "clip.vision."
Q, POST = "v.blk.0.attn_q.weight", "v.post_ln.weight"
FAULTS: list[tuple[Change, str]] = [
    (key("general.architecture", 1, U32), "architecture 1, expected 'clip'"),
    (key("general.architecture", "llama"), "architecture 'llama', expected 'clip'; it is a text model"),
    (key("general.name", 1, U32), r"key general.name is 1 \(uint32\), expected text \(string\)"),
    (key("general.description", ["x"], ARRAY, STRING), "key general.description is"),
    (key("general.file_type", "F16", STRING), "key general.file_type is 'F16'"),
    (key("general.alignment", 32, U64), r"general.alignment is 32 \(uint64\)"),
    (key("general.alignment", 8, U32), "expected 32 or a larger power of two"),
    (key("general.name\0x", 1), "expected a name without zero bytes"),
    (key("clip.use_gelu", "yes", STRING), r"key clip.use_gelu is 'yes' \(string\), expected true or false \(bool\)"),
    (key("clip.use_gelu", 1, U32), "key clip.use_gelu is 1"),
    (key("clip.use_silu", 0.5, FLOAT), "key clip.use_silu is 0.5"),
    (lambda file: [key(f"clip.use_{name}", True, BOOL)(file) for name in ("gelu", "silu")] and None, "are both true"),
    (key("clip.has_vision_encoder", 1, U32), "key clip.has_vision_encoder is 1, expected True"),
    (key("clip.has_audio_encoder", True, BOOL), "has_audio_encoder is True .* expected False or no such key"),
    (key("clip.has_audio_encoder", 0, U32), r"has_audio_encoder is 0 \(uint32\)"),
    (key("clip.has_gen_audio_encoder", "", STRING), "has_gen_audio_encoder is ''"),
    (key("clip.projector_type", 5, U32), "key clip.projector_type is 5, expected 'mlp'"),
    (key("clip.minicpmv_version", 3, I32), "key 'clip.minicpmv_version' is unknown"),
    (key("clip.vision.nobodys", 3), "key 'clip.vision.nobodys' is unknown, expected the keys of a LLaVA-1.5 mmproj"),
    (key("clip.audio.block_count", 3), "is unknown"),
    (key(V + "image_grid_pinpoints", [336, 672], ARRAY, I32), "tensor v.image_newline is missing"),
    (key(V + "mm_patch_merge_type", True, BOOL), "mm_patch_merge_type is True"),
    (key(V + "projector_type", 1, U32), "vision.projector_type is 1"),
    (key(V + "attention.head_count_kv", 4), "head_count_kv is 4 .* expected 2 or no such key"),
    (key(V + "attention.head_dim", 8), "head_dim is 8 .* expected 32 or no such key"),
    (key(V + "block_count", 0), "block_count is 0, expected a positive"),
    (key(V + "block_count", 513), "block_count is 513, expected 1 to 512"),
    (key(V + "block_count", 512), "tensor 'v.blk.2.attn_k.bias' is missing"),
    (key(V + "block_count", 1), "feature_layer"),
    (key(V + "block_count", 2**20 - 1), "block_count is 1048575, expected 1 to 512"),
    (key(V + "image_size", 14 * 74898), "'v.position_embd.weight' has shape"),
    (key(V + "image_mean", [0, 0, 0], ARRAY, I32), "image_mean is .* expected 3 floats"),
    (key(V + "image_mean", [0.0, float("nan"), 0.0]), "image_mean is .* expected 3 floats"),
    (key(V + "image_std", [0.5, 0.0, 0.5]), "image_std is .* expected 3 positive floats"),
    (key(V + "attention.layer_norm_epsilon", 0.0), "expected a small positive float"),
    (key(V + "feature_layer", [2], ARRAY, U32), r"feature_layer \[2\], expected one layer of 2"),
    (key(V + "feature_layer", 2, I32), "feature_layer is 2"),
    (key(V + "feature_layer", [1] * 100_000, ARRAY, I32), "feature_layer .* expected one layer of 2"),
    (no_tensor("mm.2.bias"), "tensor 'mm.2.bias' is missing"),
    (extra("mm.3.weight", [256]), "tensor 'mm.3.weight' is unexpected"),
    (extra(POST, [8]), r"tensor 'v.post_ln.weight' has shape \[8\]"),
    (tensor(Q, dims=[64, 32]), r"has shape \[32, 64\]"),
    (tensor("mm.0.bias", type=1), "and type 1, expected .* type 0"),
    (tensor(Q, offset=0), "lies at 0, expected"),
]  # fmt: skip
# Keys of files that people publish, beside the sizes, as their listings show them.
PUBLISHED: dict[str, dict[str, tuple[int, Any, int | None]]] = {
    "llama.cpp's LLaVA-1.5 script": {
        "clip.has_text_encoder": (BOOL, False, None),
        "clip.has_llava_projector": (BOOL, True, None),
        "general.description": (STRING, "image encoder for LLaVA", None),
        "general.name": (STRING, "openai/clip-vit-large-patch14-336", None),
    },
    "its later script": {
        "clip.has_text_encoder": (BOOL, False, None),
        "clip.has_llava_projector": (BOOL, True, None),
        V + "image_crop_resolution": (U32, 224, None),
        V + "image_split_resolution": (U32, 224, None),
        V + "image_aspect_ratio": (STRING, "pad", None),
        V + "mm_patch_merge_type": (STRING, "flat", None),
        V + "mm_projector_type": (STRING, "mlp2x_gelu", None),
    },
    "convert_hf_to_gguf": {
        "general.type": (STRING, "mmproj", None),
        "general.size_label": (STRING, "303M", None),
        "general.basename": (STRING, "llava", None),
        "general.tags": (ARRAY, ["vision"], STRING),
        "general.quantization_version": (U32, 2, None),
        "clip.has_audio_encoder": (BOOL, False, None),
        V + "projector_type": (STRING, "mlp", None),
        V + "attention.head_count_kv": (U32, 2, None),
    },
    "other programs": {"lmstudio.note": (STRING, "x", None), "split.count": (2, 1, None), "tokenizer.x": (7, True, None)},
}  # fmt: skip


def changed(bundle: Bundle, path: Path, change: Change) -> Path:
    """The bundle's mmproj with a fault."""
    file = File.read(bundle.mmproj)
    change(file)
    path.write_bytes(file.header() + file.data)
    return path


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_single_faults(bundle: Bundle, tmp_path: Path, change: Change, message: str) -> None:
    path = changed(bundle, tmp_path / "mmproj.gguf", change)
    with pytest.raises(BundleError, match=message) as caught:
        check_mmproj(Header.read(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("keys", PUBLISHED.values(), ids=list(PUBLISHED))
def test_published_keys_pass(
    bundle: Bundle, tmp_path: Path, keys: dict[str, tuple[int, Any, int | None]]
) -> None:
    def change(file: File) -> None:
        for name, (kind, value, item) in keys.items():
            key(name, value, kind, item)(file)

    assert check_mmproj(Header.read(changed(bundle, tmp_path / "mmproj.gguf", change))) == bundle.mmproj_info


def test_a_complete_tower_of_the_hub_passes(bundle: Bundle) -> None:
    """24 blocks with the last norm and no feature_layer: today's llama.cpp runs 23 of them."""
    header = bundle.mmproj_header
    tensors = {name: t for name, t in header.tensors.items() if not name.startswith("v.blk.")}
    blocks = {
        name.replace("blk.0", f"blk.{n}"): t
        for n in range(24)
        for name, t in header.tensors.items()
        if name.startswith("v.blk.0.")
    }
    norms = {f"v.post_ln.{kind}": header.tensors[f"v.pre_ln.{kind}"] for kind in ("weight", "bias")}
    laid_out, end = {}, 0
    for name, t in {**tensors, **blocks, **norms}.items():
        laid_out[name] = replace(t, name=name, offset=end)
        end += -(-t.n_bytes // 32) * 32
    keys = {k: v for k, v in header.keys.items() if k != V + "feature_layer"} | {V + "block_count": 24}
    assert check_mmproj(replace(header, keys=keys, tensors=laid_out)).n_blocks == 24


def test_a_false_count_costs_nothing(bundle: Bundle, tmp_path: Path) -> None:
    for count in (24, 512, 513, 2**20 - 1, 2**32 - 1):
        header = Header.read(changed(bundle, tmp_path / "mmproj.gguf", key(V + "block_count", count)))
        tracemalloc.start()
        start = time.perf_counter()
        with pytest.raises(BundleError):
            check_mmproj(header)
        assert time.perf_counter() - start < 0.1
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.parametrize(
    "change",
    [key("clip.use_gelu", "yes", STRING), key("clip.vision.nobodys", 3), tensor(Q, offset=0), key("general.tags", [], ARRAY, STRING)],
    ids=["type", "unknown", "layout", "empty list"],
)  # fmt: skip
def test_repair_and_quantize_copy_only_what_passed(bundle: Bundle, tmp_path: Path, change: Change) -> None:
    hub = hub_file(bundle.mmproj, tmp_path / "hub.gguf")
    file = File.read(hub)
    change(file)
    hub.write_bytes(file.header() + file.data)
    with pytest.raises(ConvertError, match="a repair does not help"):
        repair(examine(hub), tmp_path / "out.gguf")
    changed(bundle, tmp_path / "mmproj.gguf", change)
    damaged = replace(bundle)
    damaged.__dict__["mmproj_header"] = Header.read(tmp_path / "mmproj.gguf")
    with pytest.raises(BundleError):
        requantize(damaged, {tmp_path / "bundle": "Q8_0"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub.gguf", "mmproj.gguf"]


def test_a_text_model_without_optional_keys_quantizes(bundle: Bundle, tmp_path: Path) -> None:
    """Keys that llama.cpp does without: their defaults count."""
    file = File.read(bundle.model)
    for name in ("llama.vocab_size", "llama.attention.head_count_kv", "general.file_type"):
        no_key(name)(file)
    path = tmp_path / "model.gguf"
    path.write_bytes(file.header() + file.data)
    sparse = replace(bundle)
    sparse.__dict__["model_header"] = Header.read(path)
    (made,) = requantize(sparse, {tmp_path / "bundle": "Q4_K_M"})
    (whole,) = requantize(bundle, {tmp_path / "whole": "Q4_K_M"})
    assert made.model_header.tensors == whole.model_header.tensors

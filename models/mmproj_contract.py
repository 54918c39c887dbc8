"""Checks that a GGUF file is a LLaVA mmproj as libmtmd expects it: keys, tensor names, shapes, types.

libmtmd crashes on most faults, or silently misreads the file, so every file is checked here before libmtmd gets
it. Follows clip.cpp's clip_model_loader as llama-cpp-python 0.3.36 carries it. Knows the mmproj contract, no engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pocketllava.errors import BundleError, UnsupportedCheckpoint
from pocketllava.models.contract import (
    FLOAT,
    GENERAL,
    I32,
    MAX_LAYERS,
    TEXT,
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
from pocketllava.models.gguf_header import ARRAY, BF16, BOOL, F16, F32, STRING, Header
from pocketllava.models.preprocessing import PatchGrid
from pocketllava.models.tiling import UNPAD, Tiling, tiling

MATRIX_TYPES = (F32, F16, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, BF16)
CLIP_L_BLOCKS_STORED = 23  # what published files hold of CLIP ViT-L's 24 blocks
PREFIX = "clip.vision."
CLASS_EMBEDDING, PATCH_BIAS = "v.class_embd", "v.patch_embd.bias"  # CLIP has the one, SigLIP the other
NEWLINES = ("v.image_newline", "model.image_newline")  # gguf's name, and that of llama.cpp's first script
PINPOINTS = PREFIX + "image_grid_pinpoints"  # (width, height) in pixels, flattened
MERGE_TYPE, ASPECT_RATIO = PREFIX + "mm_patch_merge_type", PREFIX + "image_aspect_ratio"
ANYRES = "anyres"
POST_NORM = "v.post_ln."  # libmtmd reads it, LLaVA's graph does not
# Keys that a file may have beside the required ones: libmtmd reads them, or what made published files wrote them.
OPTIONAL: dict[str, Rule] = {
    **GENERAL,
    "general.description": Rule(TEXT, "text"),
    "clip.use_gelu": flag(),
    "clip.use_silu": flag(),
    "clip.has_text_encoder": flag(),
    "clip.has_llava_projector": flag(),
    "clip.has_minicpmv_projector": only(BOOL, False),
    "clip.has_glm_projector": only(BOOL, False),
    "clip.has_audio_encoder": only(BOOL, False),
    "clip.has_gen_audio_encoder": only(BOOL, False),
    PREFIX + "projector_type": Rule(TEXT, "text"),
    PREFIX + "feature_layer": Rule(ARRAY, "block numbers"),
    PINPOINTS: Rule(ARRAY, "pairs of 32-bit whole numbers"),
    PREFIX + "image_crop_resolution": Rule(U32, "a number"),
    PREFIX + "image_split_resolution": Rule(U32, "a number"),
    ASPECT_RATIO: Rule(TEXT, "text"),
    MERGE_TYPE: Rule(TEXT, "text"),
    PREFIX + "mm_projector_type": Rule(TEXT, "text"),
}  # fmt: skip
SIZES = (
    "embedding_length", "feed_forward_length", "block_count", "attention.head_count", "projection_dim", "image_size",
    "patch_size",
)  # fmt: skip
EPSILON = PREFIX + "attention.layer_norm_epsilon"
KNOWN = {
    *OPTIONAL, *(PREFIX + size for size in SIZES), EPSILON, PREFIX + "image_mean", PREFIX + "image_std",
    PREFIX + "attention.head_count_kv", PREFIX + "attention.head_dim", "clip.has_vision_encoder",
    "clip.projector_type",
}  # fmt: skip


@dataclass(frozen=True)
class MmprojInfo(PatchGrid):
    """The dimensions of a vision tower and projector, as the file's keys give them.

    tiling: of LLaVA-1.6, whose newline embedding is the tensor `newline`.
    """

    n_blocks: int
    vision_width: int
    projected_width: int
    class_token: bool = True
    tiling: Tiling | None = None
    newline: str | None = None


def check_mmproj(header: Header) -> MmprojInfo:
    """Check the whole contract. Raises BundleError naming the file, what was found and what was expected."""
    architecture = header.keys.get("general.architecture")
    if architecture != "clip" or header.key_types["general.architecture"] != STRING:
        raise BundleError(
            f"{header.path}: found a GGUF file of architecture {shown(architecture)}, expected 'clip'; it is a text"
            " model, not an mmproj"
        )
    _expect(header, "clip.has_vision_encoder", BOOL, True)
    _expect(header, "clip.projector_type", STRING, "mlp")
    _check_keys(header)
    dims = {name: _positive(header, PREFIX + name) for name in SIZES}
    class_token = CLASS_EMBEDDING in header.tensors or PATCH_BIAS not in header.tensors
    if (
        dims["embedding_length"] % dims["attention.head_count"]
        or dims["image_size"] < dims["patch_size"]
        or (class_token and dims["image_size"] % dims["patch_size"])
    ):
        raise BundleError(
            f"{header.path}: head_count or patch_size do not divide their sizes; download it again"
        )
    _check_attention(header, dims)
    _number(header, EPSILON)
    for name in ("image_mean", "image_std"):
        _array(header, PREFIX + name, 3)
    n_layers = _check_depth(header, dims["block_count"])
    _check_age(header, dims)
    tiles = _check_tiling(header, dims["image_size"])
    newline = next((name for name in NEWLINES if name in header.tensors), None)
    if tiles is not None and tiles.newline and newline is None:
        raise fault(
            header, f"tensor {NEWLINES[0]} is missing", "the newline that ends a row of a LLaVA-1.6 picture"
        )
    check_tensors(header, _expected(dims, n_layers, class_token, newline), "those of a LLaVA mmproj")
    check_layout(header)
    return MmprojInfo(
        dims["image_size"],
        dims["patch_size"],
        dims["block_count"],
        dims["embedding_length"],
        dims["projection_dim"],
        class_token,
        tiles,
        newline,
    )


def _check_tiling(header: Header, side: int) -> Tiling | None:
    """How the file's pictures are tiled; None for LLaVA-1.5's, and for a 1.6 file of another aspect ratio."""
    pinpoints, merge = header.keys.get(PINPOINTS), header.keys.get(MERGE_TYPE, UNPAD)
    if not pinpoints:
        return None
    if header.item_types.get(PINPOINTS) != I32 or len(pinpoints) % 2:
        raise fault(header, f"key {PINPOINTS} has {len(pinpoints)} items", "pairs of 32-bit whole numbers")
    if header.keys.get(ASPECT_RATIO, ANYRES) != ANYRES:
        return None
    sizes = list(zip(pinpoints[::2], pinpoints[1::2], strict=True))
    try:
        return tiling(sizes, merge, side, height_first=False)
    except UnsupportedCheckpoint as error:
        raise BundleError(f"{header.path}: {str(error).removeprefix('config.json: ')}") from error


def _check_keys(header: Header) -> None:
    """Keys that may be there; one that libmtmd reads aborts where its type is another."""
    check_names(header)
    for name in header.keys:
        if name.startswith("clip.") and name not in KNOWN:
            raise fault(header, f"key {shown(name)} is unknown", "the keys of a LLaVA-1.5 mmproj")
    for name, rule in OPTIONAL.items():
        check_key(header, name, rule)
    if header.keys.get("clip.use_gelu") and header.keys.get("clip.use_silu"):
        raise fault(header, "keys clip.use_gelu and clip.use_silu are both true", "one of them at most")


def _check_attention(header: Header, dims: dict[str, int]) -> None:
    """Sizes that libmtmd takes for given where they are not: heads of keys, and a head's width."""
    if dims["block_count"] > MAX_LAYERS:
        raise fault(header, f"key {PREFIX}block_count is {dims['block_count']}", f"1 to {MAX_LAYERS}")
    heads = dims["attention.head_count"]
    check_key(header, PREFIX + "attention.head_count_kv", only(U32, heads))
    check_key(header, PREFIX + "attention.head_dim", only(U32, dims["embedding_length"] // heads))


def _check_depth(header: Header, n_blocks: int) -> int:
    """The number of layers whose features are concatenated; llama.cpp concatenates them in ascending order."""
    layers = header.keys.get(PREFIX + "feature_layer")
    if layers is None and n_blocks == CLIP_L_BLOCKS_STORED:
        raise BundleError(
            f"{header.path}: no {PREFIX}feature_layer, so llama.cpp would run {n_blocks - 1} of its {n_blocks}"
            f" blocks; {_repair(header)}"
        )
    if layers is None:
        return 1
    listed = header.item_types.get(PREFIX + "feature_layer", I32) == I32 and 0 < len(layers) <= n_blocks + 1
    if not listed or layers != sorted(set(layers)) or layers[0] < 0 or not 1 <= layers[-1] <= n_blocks:
        raise BundleError(
            f"{header.path}: feature_layer {shown(layers)}, expected one layer of {n_blocks}, or several ascending"
        )
    return len(layers)


def _check_age(header: Header, dims: dict[str, int]) -> None:
    """Refuse files of llama.cpp's first scripts: CLIP's own projection_dim, and fc1 and fc2 with swapped names."""
    up, last = header.tensors.get("v.blk.0.ffn_up.weight"), header.tensors.get("mm.2.weight")
    swapped = (
        up is not None
        and up.shape == (dims["embedding_length"], dims["feed_forward_length"]) != up.shape[::-1]
    )
    if swapped or (last is not None and last.shape[0] != dims["projection_dim"]):
        raise BundleError(
            f"{header.path}: its keys or names are those of llama.cpp's first LLaVA files; {_repair(header)}"
        )


def _expected(
    dims: dict[str, int], n_layers: int, class_token: bool, newline: str | None
) -> Iterator[ExpectedTensor]:
    """Every tensor that libmtmd reads."""
    width, wide, out = dims["embedding_length"], dims["feed_forward_length"], dims["projection_dim"]
    patch, grid = dims["patch_size"], dims["image_size"] // dims["patch_size"]
    yield CLASS_EMBEDDING if class_token else PATCH_BIAS, (width,), (F32,), True
    yield "v.patch_embd.weight", (width, 3, patch, patch), (F32, F16), True
    # llama.cpp's first tool for quantizing these files takes this matrix, too: Mozilla's llamafile has it in Q4_0
    yield "v.position_embd.weight", (grid * grid + class_token, width), MATRIX_TYPES, True
    if class_token:
        yield from _norm("v.pre_ln", width)
    for name in (POST_NORM + kind for kind in ("weight", "bias")):
        yield name, (width,), (F32,), False
    yield from _linear("mm.0", out, n_layers * width)
    yield from _linear("mm.2", out, out)
    if newline is not None:
        yield newline, (out,), (F32,), True
    for block in range(dims["block_count"]):
        at = f"v.blk.{block}."
        for name in ("attn_k", "attn_out", "attn_q", "attn_v"):
            yield from _linear(at + name, width, width)
        yield from _linear(at + "ffn_up", wide, width)
        yield from _linear(at + "ffn_down", width, wide)
        yield from _norm(at + "ln1", width)
        yield from _norm(at + "ln2", width)


def _linear(name: str, rows: int, columns: int) -> Iterator[ExpectedTensor]:
    yield f"{name}.bias", (rows,), (F32,), True
    yield f"{name}.weight", (rows, columns), MATRIX_TYPES, True


def _norm(name: str, width: int) -> Iterator[ExpectedTensor]:
    for kind in ("weight", "bias"):
        yield f"{name}.{kind}", (width,), (F32,), True


def _expect(header: Header, name: str, kind: int, value: Any) -> None:
    actual = header.keys.get(name)
    if actual is None and "mm.2.weight" in header.tensors:
        raise BundleError(f"{header.path}: no {name}, expected {value!r}; {_repair(header)}")
    if actual != value or header.key_types.get(name) != kind:
        raise BundleError(
            f"{header.path}: key {name} is {shown(actual)}, expected {value!r}; not a LLaVA-1.5 mmproj"
        )


def _repair(header: Header) -> str:
    """The advice for a file that only lacks keys, or has those of llama.cpp's first scripts."""
    return f"run `pocketllava convert --repair {header.path}`"


def _positive(header: Header, name: str) -> int:
    value = header.keys.get(name)
    if header.key_types.get(name) != U32 or not isinstance(value, int) or not 0 < value < 1 << 20:
        raise BundleError(
            f"{header.path}: key {name} is {shown(value)}, expected a positive 32-bit whole number"
        )
    return value


def _number(header: Header, name: str) -> None:
    value = header.keys.get(name)
    if header.key_types.get(name) != FLOAT or not isinstance(value, float) or not 0 < value < 1:
        raise BundleError(f"{header.path}: key {name} is {shown(value)}, expected a small positive float")


def _array(header: Header, name: str, length: int) -> None:
    """Mean or standard deviation of the three colors; pixels are divided by the latter."""
    value = header.keys.get(name)
    floats = header.key_types.get(name) == ARRAY and header.item_types.get(name, FLOAT) == FLOAT
    if (
        not floats
        or not isinstance(value, list)
        or len(value) != length
        or not all(map(math.isfinite, value))
    ):
        raise BundleError(f"{header.path}: key {name} is {shown(value)}, expected {length} floats")
    if name.endswith("_std") and min(value) <= 0:
        raise BundleError(f"{header.path}: key {name} is {shown(value)}, expected {length} positive floats")

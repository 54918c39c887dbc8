"""Checks that a GGUF file is a LLaVA mmproj as libmtmd expects it: keys, tensor names, shapes, types.

libmtmd crashes on most faults, or silently misreads the file, so every file is checked here before libmtmd gets
it. Knows the mmproj contract, no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocketllava.errors import BundleError, UnsupportedCheckpoint
from pocketllava.models.gguf_header import ARRAY, BF16, BOOL, F16, F32, FLOAT, I32, STRING, U32, Header
from pocketllava.models.preprocessing import PatchGrid
from pocketllava.models.tiling import Tiling, tiling

MATRIX_TYPES = (F32, F16, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, BF16)
CLIP_L_BLOCKS_STORED = 23  # what published files hold of CLIP ViT-L's 24 blocks
PREFIX = "clip.vision."
CLASS_EMBEDDING, PATCH_BIAS = "v.class_embd", "v.patch_embd.bias"  # CLIP has the one, SigLIP the other
NEWLINES = ("v.image_newline", "model.image_newline")  # gguf's name, and that of llama.cpp's first script
PINPOINTS = PREFIX + "image_grid_pinpoints"  # (width, height) in pixels, flattened
MERGE_TYPE, ASPECT_RATIO = PREFIX + "mm_patch_merge_type", PREFIX + "image_aspect_ratio"
ANYRES = "anyres"


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
    if (architecture := header.keys.get("general.architecture")) != "clip":
        raise BundleError(
            f"{header.path}: found a GGUF file of architecture {architecture!r}, expected 'clip'; it is a text model,"
            " not an mmproj"
        )
    _expect(header, "clip.has_vision_encoder", BOOL, True)
    _expect(header, "clip.projector_type", STRING, "mlp")
    dims = {
        name: _positive(header, PREFIX + name)
        for name in (
            "embedding_length",
            "feed_forward_length",
            "block_count",
            "attention.head_count",
            "projection_dim",
            "image_size",
            "patch_size",
        )
    }
    class_token = CLASS_EMBEDDING in header.tensors or PATCH_BIAS not in header.tensors
    if (
        dims["embedding_length"] % dims["attention.head_count"]
        or dims["image_size"] < dims["patch_size"]
        or (class_token and dims["image_size"] % dims["patch_size"])
    ):
        raise BundleError(
            f"{header.path}: head_count or patch_size do not divide their sizes; download it again"
        )
    _number(header, PREFIX + "attention.layer_norm_epsilon")
    for name in ("image_mean", "image_std"):
        _array(header, PREFIX + name, 3)
    n_layers = _check_depth(header, dims["block_count"])
    _check_age(header, dims)
    tiles = _check_tiling(header, dims["image_size"])
    newline = next((name for name in NEWLINES if name in header.tensors), None)
    if tiles is not None and tiles.merge == "spatial_unpad" and newline is None:
        raise BundleError(
            f"{header.path}: no tensor {NEWLINES[0]!r}, which ends a row of a LLaVA-1.6 picture; download it again"
        )
    _check_tensors(header, dims, n_layers, class_token, newline)
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
    pinpoints, merge = header.keys.get(PINPOINTS), header.keys.get(MERGE_TYPE, "spatial_unpad")
    if pinpoints is None or header.keys.get(ASPECT_RATIO, ANYRES) != ANYRES:
        return None
    if not isinstance(pinpoints, list) or header.item_types.get(PINPOINTS) != I32 or len(pinpoints) % 2:
        raise BundleError(f"{header.path}: key {PINPOINTS} is not an array of pairs of 32-bit whole numbers")
    sizes = list(zip(pinpoints[::2], pinpoints[1::2], strict=True))
    try:
        return tiling(sizes, merge, side, height_first=False)
    except UnsupportedCheckpoint as error:
        raise BundleError(f"{header.path}: {str(error).removeprefix('config.json: ')}") from error


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
    listed = isinstance(layers, list) and layers and all(type(n) is int for n in layers)
    if not listed or layers != sorted(set(layers)) or layers[0] < 0 or not 1 <= layers[-1] <= n_blocks:
        raise BundleError(
            f"{header.path}: feature_layer {layers!r}, expected one layer of {n_blocks}, or several ascending"
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


def _check_tensors(
    header: Header, dims: dict[str, int], n_layers: int, class_token: bool, newline: str | None
) -> None:
    expected = dict(_expected(dims, n_layers, class_token))
    if newline is not None:
        expected[newline] = ((dims["projection_dim"],), (F32,))
    tensors = {name: t for name, t in header.tensors.items() if not name.startswith("v.post_ln.")}
    for name in sorted(set(expected) ^ set(tensors)):
        state = "missing" if name in expected else "unexpected"
        raise BundleError(
            f"{header.path}: tensor {name!r} is {state} for a LLaVA-1.5 mmproj; convert or download it again"
        )
    for name, (shape, types) in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.type not in types:
            raise BundleError(
                f"{header.path}: tensor {name!r} has shape {list(tensor.shape)} and type {tensor.type}, expected"
                f" {list(shape)} and one of {list(types)}; convert or download it again"
            )


def _expected(
    dims: dict[str, int], n_layers: int, class_token: bool
) -> list[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    width, wide, out = dims["embedding_length"], dims["feed_forward_length"], dims["projection_dim"]
    vector: tuple[int, ...] = (F32,)
    patch, grid = dims["patch_size"], dims["image_size"] // dims["patch_size"]

    def linear(name: str, rows: int, columns: int) -> list[Any]:
        return [(f"{name}.weight", ((rows, columns), MATRIX_TYPES)), (f"{name}.bias", ((rows,), vector))]

    def norm(name: str) -> list[Any]:
        return [(f"{name}.{kind}", ((width,), vector)) for kind in ("weight", "bias")]

    tensors: list[Any] = [
        (CLASS_EMBEDDING if class_token else PATCH_BIAS, ((width,), vector)),
        ("v.patch_embd.weight", ((width, 3, patch, patch), (F32, F16))),
        ("v.position_embd.weight", ((grid * grid + class_token, width), (F32, F16))),
        *(norm("v.pre_ln") if class_token else ()),
        *linear("mm.0", out, n_layers * width),
        *linear("mm.2", out, out),
    ]
    for block in range(dims["block_count"]):
        at = f"v.blk.{block}."
        tensors += [*norm(at + "ln1"), *norm(at + "ln2")]
        tensors += [
            t for p in ("attn_q", "attn_k", "attn_v", "attn_out") for t in linear(at + p, width, width)
        ]
        tensors += [*linear(at + "ffn_up", wide, width), *linear(at + "ffn_down", width, wide)]
    return tensors


def _expect(header: Header, name: str, kind: int, value: Any) -> None:
    actual = header.keys.get(name)
    if actual is None and "mm.2.weight" in header.tensors:
        raise BundleError(f"{header.path}: no {name}, expected {value!r}; {_repair(header)}")
    if actual != value or header.key_types.get(name) != kind:
        raise BundleError(
            f"{header.path}: key {name} is {actual!r}, expected {value!r}; not a LLaVA-1.5 mmproj"
        )


def _repair(header: Header) -> str:
    """The advice for a file that only lacks keys, or has those of llama.cpp's first scripts."""
    return f"run `pocketllava convert --repair {header.path}`"


def _positive(header: Header, name: str) -> int:
    value = header.keys.get(name)
    if header.key_types.get(name) != U32 or not isinstance(value, int) or not 0 < value < 1 << 20:
        raise BundleError(f"{header.path}: key {name} is {value!r}, expected a positive 32-bit whole number")
    return value


def _number(header: Header, name: str) -> None:
    value = header.keys.get(name)
    if header.key_types.get(name) != FLOAT or not isinstance(value, float) or not 0 < value < 1:
        raise BundleError(f"{header.path}: key {name} is {value!r}, expected a small positive float")


def _array(header: Header, name: str, length: int) -> None:
    value = header.keys.get(name)
    if header.key_types.get(name) != ARRAY or not isinstance(value, list) or len(value) != length:
        raise BundleError(f"{header.path}: key {name} is {value!r}, expected {length} floats")

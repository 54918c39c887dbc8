"""Whether a GGUF file is a LLaVA-1.5 mmproj that libmtmd reads rightly: keys, tensor names, shapes, types.

libmtmd itself crashes on, or silently misreads, most of what can be wrong; so nothing is handed to it that
was not checked here. Knows the mmproj contract, no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pocketllava.errors import BundleError
from pocketllava.models.gguf_header import ARRAY, Header
from pocketllava.models.patches import PatchGrid

F32, F16, BF16 = 0, 1, 30  # enum ggml_type
MATRIX_TYPES = (F32, F16, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, BF16)
U32, I32, FLOAT, BOOL, TEXT = 4, 5, 6, 7, 8  # enum gguf_type
CLIP_L_BLOCKS_STORED = 23  # what published files hold of CLIP ViT-L's 24 blocks
PREFIX = "clip.vision."
CLASS_EMBEDDING, PATCH_BIAS = "v.class_embd", "v.patch_embd.bias"  # CLIP has the one, SigLIP the other


@dataclass(frozen=True)
class MmprojInfo(PatchGrid):
    """The shape of a vision tower and projector, as its file says."""

    n_blocks: int
    vision_width: int
    projected_width: int
    class_token: bool = True


def check_mmproj(header: Header) -> MmprojInfo:
    """Check the whole contract. Raises BundleError naming the file, what was found and what was expected."""
    if header.keys.get("general.architecture") != "clip":
        found = header.keys.get("general.architecture")
        raise BundleError(
            f"{header.path}: found a GGUF file of architecture {found!r}, expected 'clip'; it is a text model,"
            " not an mmproj"
        )
    _expect(header, "clip.has_vision_encoder", BOOL, True)
    _expect(header, "clip.projector_type", TEXT, "mlp")
    n = {
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
        n["embedding_length"] % n["attention.head_count"]
        or n["image_size"] < n["patch_size"]
        or (class_token and n["image_size"] % n["patch_size"])
    ):
        raise BundleError(
            f"{header.path}: head_count or patch_size do not divide their sizes; download it again"
        )
    _number(header, PREFIX + "attention.layer_norm_epsilon")
    for name in ("image_mean", "image_std"):
        _array(header, PREFIX + name, 3)
    n_layers = _check_depth(header, n["block_count"])
    _check_age(header, n)
    _check_tensors(header, n, n_layers, class_token)
    return MmprojInfo(
        n["image_size"],
        n["patch_size"],
        n["block_count"],
        n["embedding_length"],
        n["projection_dim"],
        class_token,
    )


def _check_depth(header: Header, n_blocks: int) -> int:
    """How many layers' features stand side by side; llama.cpp stacks them ascending."""
    layers = header.keys.get(PREFIX + "feature_layer")
    if layers is None and n_blocks == CLIP_L_BLOCKS_STORED:
        raise BundleError(
            f"{header.path}: no {PREFIX}feature_layer, so llama.cpp would run {n_blocks - 1} of its {n_blocks}"
            f" blocks; {_repair(header)}"
        )
    if layers is None:
        return 1
    whole = isinstance(layers, list) and layers and all(type(n) is int for n in layers)
    if not whole or layers != sorted(set(layers)) or layers[0] < 0 or not 1 <= layers[-1] <= n_blocks:
        raise BundleError(
            f"{header.path}: feature_layer {layers!r}, expected one layer of {n_blocks}, or several ascending"
        )
    return len(layers)


def _check_age(header: Header, n: dict[str, int]) -> None:
    """Files of llama.cpp's first scripts: CLIP's own projection_dim, and fc1 and fc2 under each other's names."""
    up, last = header.tensors.get("v.blk.0.ffn_up.weight"), header.tensors.get("mm.2.weight")
    swapped = (
        up is not None and up.shape == (n["embedding_length"], n["feed_forward_length"]) != up.shape[::-1]
    )
    if swapped or (last is not None and last.shape[0] != n["projection_dim"]):
        raise BundleError(
            f"{header.path}: its keys or names are those of llama.cpp's first LLaVA files; {_repair(header)}"
        )


def _check_tensors(header: Header, n: dict[str, int], n_layers: int, class_token: bool) -> None:
    expected = dict(_expected(n, n_layers, class_token))
    found = {name: t for name, t in header.tensors.items() if not name.startswith("v.post_ln.")}
    for name in sorted(set(expected) ^ set(found)):
        state = "missing" if name in expected else "unexpected"
        raise BundleError(
            f"{header.path}: tensor {name!r} is {state} for a LLaVA-1.5 mmproj; convert or download it again"
        )
    for name, (shape, types) in expected.items():
        tensor = found[name]
        if tensor.shape != shape or tensor.type not in types:
            raise BundleError(
                f"{header.path}: tensor {name!r} has shape {list(tensor.shape)} and type {tensor.type}, expected"
                f" {list(shape)} and one of {list(types)}; convert or download it again"
            )


def _expected(
    n: dict[str, int], n_layers: int, class_token: bool
) -> list[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    width, wide, out = n["embedding_length"], n["feed_forward_length"], n["projection_dim"]
    vector: tuple[int, ...] = (F32,)
    patch, grid = n["patch_size"], n["image_size"] // n["patch_size"]

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
    for block in range(n["block_count"]):
        at = f"v.blk.{block}."
        tensors += [*norm(at + "ln1"), *norm(at + "ln2")]
        tensors += [
            t for p in ("attn_q", "attn_k", "attn_v", "attn_out") for t in linear(at + p, width, width)
        ]
        tensors += [*linear(at + "ffn_up", wide, width), *linear(at + "ffn_down", width, wide)]
    return tensors


def _expect(header: Header, name: str, kind: int, value: Any) -> None:
    found = header.keys.get(name)
    if found is None and "mm.2.weight" in header.tensors:
        raise BundleError(f"{header.path}: no {name}, expected {value!r}; {_repair(header)}")
    if found != value or header.key_types.get(name) != kind:
        raise BundleError(
            f"{header.path}: key {name} is {found!r}, expected {value!r}; not a LLaVA-1.5 mmproj"
        )


def _repair(header: Header) -> str:
    """What to do about a file that only lacks keys, or has those of llama.cpp's first scripts."""
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

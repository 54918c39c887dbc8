"""Vision tower and projector -> the plan of mmproj.gguf (libmtmd's `clip`, projector type `mlp`).

Knows libmtmd's names, exact value types and tensor types (tools/mtmd/clip.cpp): a wrong one rarely gives
an error there, it crashes or answers wrongly. Only the blocks that the features need are written, and
`feature_layer` says how many: without it libmtmd runs one block too few (llama.cpp #25817).
"""

from __future__ import annotations

from collections.abc import Iterator

from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

from pocketllava.convert.plan.file_plan import FilePlan, PlannedTensor, TensorTaker
from pocketllava.convert.plan.quantize import MMPROJ_TYPES, fitting
from pocketllava.convert.read.checkpoint import Checkpoint
from pocketllava.convert.read.config import LlavaConfig, VisionConfig
from pocketllava.convert.read.sources import SourceTensor
from pocketllava.models.gguf_writer import Key
from pocketllava.models.mmproj_contract import ANYRES, ASPECT_RATIO, MERGE_TYPE, NEWLINES, PINPOINTS
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.models.tiling import flattened

ARCHITECTURE = "clip"
PROJECTOR_TYPE = "mlp"  # gguf has no constant for it
BLOCK = (  # canonical name in a layer, libmtmd's name in a block
    ("layer_norm1", "ln1"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.out_proj", "attn_out"),
    ("layer_norm2", "ln2"),
    ("mlp.fc1", "ffn_up"),
    ("mlp.fc2", "ffn_down"),
)


def plan_mmproj(
    checkpoint: Checkpoint,
    config: LlavaConfig,
    preprocessing: Preprocessing,
    quant: str,
    dropped: dict[str, str],
) -> FilePlan:
    """Map every vision and projector tensor. Raises TensorMismatch; records in `dropped` what is left out."""
    vision = TensorTaker(checkpoint.tensors, "vision")
    projector = TensorTaker(checkpoint.tensors, "projector")
    used = config.vision.n_used
    for n in range(used, config.vision.n_layer):
        vision.drop(f"vision.encoder.layers.{n}.", f"features are those after block {used - 1}", dropped)
    vision.drop("vision.post_layernorm.", "not applied to patch features", dropped)
    if not config.vision.class_token:
        vision.drop("vision.head.", "pools patches, which LLaVA takes one by one", dropped)
    newline = list(_newline(projector, config, preprocessing))
    if not newline:
        projector.drop(
            "projector.image_newline", "ends the rows of tiled pictures, which this model has not", dropped
        )
    order = {"mm.0.weight": config.vision.layer_order}
    tensors = tuple(
        PlannedTensor(
            name,
            source.shape,
            type_of(name, source.shape, quant),
            source,
            column_groups=order.get(name, (0,)),
        )
        for name, source in (*_vision(vision, config.vision), *_projector(projector, config), *newline)
    )
    vision.finish(dropped)
    projector.finish(dropped)
    return FilePlan(ARCHITECTURE, tuple(_keys(checkpoint, config, preprocessing, quant)), tensors)


def _vision(taker: TensorTaker, v: VisionConfig) -> Iterator[tuple[str, SourceTensor]]:
    embeddings = "vision.embeddings."
    if v.class_token:
        yield "v.class_embd", taker.take(embeddings + "class_embedding", (v.n_embd,))
    patch = (v.n_embd, 3, v.patch_size, v.patch_size)
    yield "v.patch_embd.weight", taker.take(embeddings + "patch_embedding.weight", patch)
    if not v.class_token:
        yield "v.patch_embd.bias", taker.take(embeddings + "patch_embedding.bias", (v.n_embd,))
    positions = (v.n_patches + v.class_token, v.n_embd)
    yield "v.position_embd.weight", taker.take(embeddings + "position_embedding.weight", positions)
    if v.class_token:
        yield from _pair(taker, "vision.pre_layrnorm", "v.pre_ln", (v.n_embd,))
    shapes = {
        "ffn_up": (v.n_ff, v.n_embd),
        "ffn_down": (v.n_embd, v.n_ff),
        "ln1": (v.n_embd,),
        "ln2": (v.n_embd,),
    }
    for n in range(v.n_used):
        for hf_name, gguf_name in BLOCK:
            shape = shapes.get(gguf_name, (v.n_embd, v.n_embd))
            yield from _pair(taker, f"vision.encoder.layers.{n}.{hf_name}", f"v.blk.{n}.{gguf_name}", shape)


def _projector(taker: TensorTaker, c: LlavaConfig) -> Iterator[tuple[str, SourceTensor]]:
    """linear_1 and linear_2 are mm.0 and mm.2: the GELU between them is number 1."""
    yield from _pair(taker, "projector.linear_1", "mm.0", (c.text.n_embd, c.vision.n_features))
    yield from _pair(taker, "projector.linear_2", "mm.2", (c.text.n_embd, c.text.n_embd))


def _newline(taker: TensorTaker, c: LlavaConfig, p: Preprocessing) -> Iterator[tuple[str, SourceTensor]]:
    """LLaVA-1.6's embedding behind each row of patches."""
    if p.tiling is not None and p.tiling.newline:
        yield NEWLINES[0], taker.take("projector.image_newline", (c.text.n_embd,))


def _pair(
    taker: TensorTaker, hf_name: str, gguf_name: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, SourceTensor]]:
    yield f"{gguf_name}.weight", taker.take(f"{hf_name}.weight", shape)
    yield f"{gguf_name}.bias", taker.take(f"{hf_name}.bias", shape[:1])


def type_of(name: str, shape: tuple[int, ...], quant: str) -> T:
    """Vectors and positions F32; the convolution F32 or F16, since ggml has no other; matrices as asked."""
    wanted = MMPROJ_TYPES[quant][0]
    if len(shape) == 1 or name == "v.position_embd.weight":
        return T.F32
    if name == "v.patch_embd.weight":
        return T.F32 if wanted is T.F32 else T.F16
    return fitting(wanted, shape[-1])


def _keys(checkpoint: Checkpoint, c: LlavaConfig, p: Preprocessing, quant: str) -> Iterator[Key]:
    v = c.vision
    yield Key("general.type", "mmproj", V.STRING)
    yield Key("general.name", str(checkpoint.identity["id"]), V.STRING)
    yield Key("general.file_type", int(MMPROJ_TYPES[quant][1]), V.UINT32)
    yield Key("clip.has_vision_encoder", True, V.BOOL)
    yield Key("clip.projector_type", PROJECTOR_TYPE, V.STRING)
    yield Key("clip.use_gelu", not v.quick_gelu, V.BOOL)  # the tanh formula, which is SigLIP's
    numbers = {
        "projection_dim": c.text.n_embd,
        "image_size": v.image_size,
        "patch_size": v.patch_size,
        "embedding_length": v.n_embd,
        "feed_forward_length": v.n_ff,
        "block_count": v.n_used,
        "attention.head_count": v.n_head,
    }
    for name, value in numbers.items():
        yield Key(f"clip.vision.{name}", value, V.UINT32)
    yield Key("clip.vision.attention.layer_norm_epsilon", v.eps, V.FLOAT32)
    yield Key("clip.vision.feature_layer", list(v.feature_layers), V.ARRAY, V.INT32)
    yield Key("clip.vision.image_mean", list(p.mean), V.ARRAY, V.FLOAT32)
    yield Key("clip.vision.image_std", list(p.std), V.ARRAY, V.FLOAT32)
    if p.tiling is not None:
        yield Key(PINPOINTS, flattened(p.tiling.pinpoints), V.ARRAY, V.INT32)
        yield Key(MERGE_TYPE, p.tiling.merge, V.STRING)
        yield Key(ASPECT_RATIO, ANYRES, V.STRING)

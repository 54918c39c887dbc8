"""Plans, bundles, traces and timings as lines of text. Knows their fields; prints nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pocketllava.models.plan_text import size
from pocketllava.types import Choice, Timings, Trace

if TYPE_CHECKING:
    from pocketllava.convert import ConvertPlan
    from pocketllava.measure.device_drift import DeviceDrift
    from pocketllava.measure.speed import Figure
    from pocketllava.models import Bundle
    from pocketllava.models.gguf_header import Header, TensorInfo
    from pocketllava.models.memory import Memory
    from pocketllava.models.mmproj_contract import MmprojInfo
    from pocketllava.models.text_contract import TextInfo

NEIGHBORS = 6  # token ids shown on either side of an image
SHOWN_S = 0.005  # a shorter wait in the queue would read as 0.00 s


def plan_lines(planned: ConvertPlan, out: str, threads: int) -> list[str]:
    """Every tensor of both files, the tensors left out, disk and memory."""
    lines = []
    for file, name in ((planned.text, "model.gguf"), (planned.mmproj, "mmproj.gguf")):
        lines.append(f"{name}  {size(file.n_bytes)} of tensors")
        for t in file.tensors:
            kinds = f"{t.source.dtype:>4} -> {t.type.name:<6}"
            lines.append(f"  {t.name:<28} {_shape(t.shape):<20} {kinds} {size(t.n_bytes):>10}")
    lines += [f"  left out: {name} ({reason})" for name, reason in planned.dropped.items()]
    memory = f"memory: about {size(planned.memory_bytes(threads))} with {threads} threads"
    return [*lines, f"disk: {size(planned.disk_bytes)} in {out}; {memory}"]


def timing_line(t: Timings) -> str:
    """An answer's timings and devices."""
    cached = f" ({t.cached_tokens} cached)" if t.cached_tokens else ""
    left_out = f" | {t.left_out} oldest messages left out" if t.left_out else ""
    if t.image_tokens < t.all_image_tokens:
        cached += f", {t.image_tokens} of {t.all_image_tokens} image tokens,"
    devices = f"text: {t.devices[0]} | vision: {t.devices[1]}"
    queue = f"queue {t.queue_s:.2f} s | " if t.queue_s >= SHOWN_S else ""
    return (
        f"load {t.load_s:.2f} s | {queue}image {t.preprocess_s:.2f} s | encoding {t.encode_s:.2f} s"
        f" | prompt {t.prompt_tokens} tokens{cached} {t.prompt_s:.2f} s | first token {t.first_token_s:.2f} s"
        f" | {t.answer_tokens} tokens, {t.tokens_per_s:.1f}/s | {devices}{left_out}"
    )


def choices_line(choices: Sequence[Choice]) -> str:
    """How likely each choice is."""
    return "choices: " + " | ".join(f"{choice.text} {choice.probability:.1%}" for choice in choices)


def tree(bundle: Bundle) -> list[str]:
    """A bundle as a tree of its three parts, one block standing for all."""
    types = bundle.manifest.types
    text, vision = bundle.model_header, bundle.mmproj_header
    towers = [t for t in vision.tensors.values() if t.name.startswith("v.")]
    projector = [t for t in vision.tensors.values() if t.name.startswith("mm.")]
    return [
        f"{bundle.folder}  ({bundle.manifest.source.id}, {types.model} + {types.mmproj})",
        f"├── vision tower  {_summary(towers)}",
        *_below("│   ", [*_vision_facts(vision, bundle.mmproj_info), *_first_block(towers, "v.blk.")]),
        f"├── projector  {_summary(projector)}",
        *_below("│   ", [_line(t) for t in projector]),
        f"└── text model  {_summary(list(text.tensors.values()))}",
        *_below("    ", [*_text_facts(bundle.text_info), *_first_block(list(text.tensors.values()), "blk.")]),
        _preprocessing(bundle),
        f"chat template: {json.dumps(bundle.template)}",
    ]


def memory_line(m: Memory, available: int) -> str:
    """The memory that a loaded bundle takes, part by part, and the free memory."""
    parts = f"text model {size(m.text)}, vision {size(m.vision)}, KV cache of {m.n_ctx} tokens in {m.kv_type}"
    return (
        f"memory: {size(m.total)} ({parts} {size(m.kv_cache)}, buffers and Python about"
        f" {size(m.total - m.text - m.vision - m.kv_cache)}), and {size(m.prefix)}"
        f" for each image kept to go back to; free now: {size(available)}"
    )


def trace_lines(t: Trace) -> list[str]:
    """One picture from pixels to positions, with the tokens around it."""
    first, last = t.image_positions
    channels, height, width = t.pixel_shape
    rows, columns = t.grid
    place = "moved to the front" if t.class_token_corrected else "in front already"
    verdict = "are" if t.embeddings_match else "ARE NOT"
    return [
        *_tile_lines(t),
        f"pixel_values ({channels}, {height}, {width})",
        f"  -> {rows} x {columns} = {rows * columns} patches",
        f"  -> vision tower {t.vision_shape} (class token {place})",
        f"  -> projector {t.feature_shape}",
        f"  -> positions {first}..{last} of {len(t.token_ids)} in the prompt",
        f"before: {_tokens(t, first - NEIGHBORS, first)}",
        f"after:  {_tokens(t, last + 1, last + 1 + NEIGHBORS)}",
        f"the embeddings at positions {first}..{last} {verdict} the image features"
        f" (largest difference {t.max_difference:.1e} after the first RMS norm)",
    ]


def drift_line(drift: DeviceDrift) -> str:
    """How far a device moves the features from the CPU's, and whether they are made there."""
    sums = "sums in F32" if drift.sums_in_f32 else "sums in F16"
    if drift.error is None:
        return f"features on {drift.device}: no room for the vision tower, which runs on the CPU"
    runs = "the vision tower runs there" if drift.taken else "the vision tower runs on the CPU"
    return (
        f"features on {drift.device}: {drift.error:.1e} from the CPU's, {sums}; {runs} unless told otherwise"
    )


def _tile_lines(t: Trace) -> list[str]:
    """How a tiled picture becomes its image tokens."""
    if t.tiles is None or t.unpadded is None:
        return []
    (rows, columns), (patch_rows, patch_columns) = t.tiles, t.unpadded
    tokens, base = t.feature_shape[0], t.grid[0] * t.grid[1]
    return [
        f"the whole picture as one tile, and {rows} x {columns} tiles: {1 + rows * columns} times the pixels below",
        f"  {patch_rows} x {patch_columns} patches without padding: {tokens} image tokens, {base} of them the whole"
        " picture's",
    ]


def summary_lines(table: dict[str, Any]) -> list[str]:
    """An evaluation's figures."""
    lines = [
        f"{table['accuracy']:.1%} of {table['n']} right ({table['soft_accuracy']:.1%} by VQA's soft match)"
    ]
    lines += [f"  {kind:<12} {share:.1%}" for kind, share in table["by_type"].items()]
    if "yes_no" in table:
        lines.append("yes/no: " + ", ".join(f"{name} {value:.1%}" for name, value in table["yes_no"].items()))
    return lines


def figure_lines(about: dict[str, Any], figures: list[Figure]) -> list[str]:
    """What was measured on, and a table of medians with the smallest and largest value."""
    lines = [
        f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}"
        for name, value in about.items()
    ]
    width = max(len(f.name) for f in figures)
    lines += ["", f"{'':<{width}} {'median':>10} {'min':>10} {'max':>10}"]
    for f in figures:
        values = (f.median, min(f.values, default=None), max(f.values, default=None))
        numbers = " ".join(f"{_figure(value):>10}" for value in values)
        lines.append(f"{f.name:<{width}} {numbers} {f.unit}")
    return lines


def _figure(value: float | None) -> str:
    """Three significant digits, without powers of ten; "-" for no value."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.4f}"


def _vision_facts(header: Header, info: MmprojInfo) -> list[str]:
    heads, wide = (
        header.keys[f"clip.vision.{name}"] for name in ("attention.head_count", "feed_forward_length")
    )
    side, grid = info.image_size, info.grid
    return [
        f"{info.n_blocks} CLIP blocks, width {info.vision_width}, {heads} heads, feed-forward {wide}",
        f"{side} x {side} pixels, patches of {info.patch_size}: {grid} x {grid} = {info.n_patches}",
        *_tiling_facts(info),
    ]


def _tiling_facts(info: MmprojInfo) -> list[str]:
    if info.tiling is None:
        return []
    sizes = ", ".join(f"{width} x {height}" for width, height in info.tiling.pinpoints)
    return [
        f"the whole picture, and tiles of a picture fitted to {sizes} pixels, merged by {info.tiling.merge}"
    ]


def _text_facts(info: TextInfo) -> list[str]:
    return [
        f"{info.n_layer} blocks, width {info.n_embd}, {info.n_head} heads ({info.n_head_kv} for keys and values),"
        f" feed-forward {info.n_ff}",
        f"vocabulary {info.n_vocab}, context {info.n_ctx_train}",
    ]


def _first_block(tensors: list[TensorInfo], prefix: str) -> list[str]:
    """Tensors outside blocks, those of block 0, and which types vary from block to block."""
    shown = [t for t in tensors if not t.name.startswith(prefix) or t.name.startswith(prefix + "0.")]
    types: dict[str, set[str]] = {}
    for t in tensors:
        if t.name.startswith(prefix):
            types.setdefault(t.name.removeprefix(prefix).split(".", 1)[1], set()).add(_type(t))
    mixed = [f"{name} {' and '.join(sorted(kinds))}" for name, kinds in types.items() if len(kinds) > 1]
    return [*map(_line, shown), f"(block 0 stands for all; {'; '.join(mixed) or 'all have the same types'})"]


def _below(indent: str, lines: list[str]) -> list[str]:
    return [f"{indent}{'└' if n == len(lines) - 1 else '├'}── {line}" for n, line in enumerate(lines)]


def _summary(tensors: list[TensorInfo]) -> str:
    counts: dict[str, int] = {}
    for t in tensors:
        counts[_type(t)] = counts.get(_type(t), 0) + 1
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{len(tensors)} tensors ({kinds}), {size(sum(t.n_bytes for t in tensors))}"


def _line(t: TensorInfo) -> str:
    return f"{t.name} {_shape(t.shape)} {_type(t)}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _type(t: TensorInfo) -> str:
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(t.type).name)


def _preprocessing(bundle: Bundle) -> str:
    p: Any = bundle.preprocessing
    if p.tiling is not None:
        return (
            f"preprocessing: tiles of {p.crop_size} x {p.crop_size} (resample {p.resample}),"
            f" mean {p.mean}, std {p.std}"
        )
    resize = f"shortest edge {p.shortest_edge}" if p.shortest_edge else f"{p.crop_size} x {p.crop_size}"
    return (
        f"preprocessing: {'pad to a square, ' if p.pad_to_square else ''}resize {resize} (resample {p.resample}),"
        f" crop {p.crop_size} x {p.crop_size}, mean {p.mean}, std {p.std}"
    )


def _tokens(t: Trace, start: int, end: int) -> str:
    shown = range(max(0, start), min(end, len(t.token_ids)))
    return " ".join(f"{t.token_ids[i]}:{t.token_texts[i]!r}" for i in shown)

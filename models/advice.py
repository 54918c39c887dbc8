"""What would take less memory than a plan does, in the order of harm, each with its figure.

Knows options and the types of files; how a changed plan is made it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pocketllava.models.bundle import Bundle
from pocketllava.models.machine import Machine
from pocketllava.models.memory import smaller_contexts, text_bytes_in, vision_bytes_in
from pocketllava.types import LoadOptions

if TYPE_CHECKING:
    from pocketllava.models.plan import Plan

Planned = Callable[[Bundle, LoadOptions, Machine], "Plan"]
VISION_BYTES = 34 / 32  # a value in Q8_0
# Types of the text model, with the bits that a value takes on average in a 7B model.
TEXT_TYPES = {"Q8_0": 8.5, "Q6_K": 6.57, "Q5_K_M": 5.68, "Q4_K_M": 4.85, "Q3_K_M": 3.91, "Q2_K": 3.01}
Q8_0_BLOCK = 32  # values
LEAST_SAVING = 20  # a smaller type saves at least this part of the text model


@dataclass(frozen=True)
class Change:
    """Something that takes less: what, how it is said, the total in bytes with it, and whether the model then fits."""

    what: str
    how: str
    total: int
    fits: bool


def changes(bundle: Bundle, options: LoadOptions, base: Plan, planned: Planned) -> tuple[Change, ...]:
    """Each change alone, and where none is enough, those of the options together; none that takes no less."""
    every = (*_of_options(bundle, options, base, planned), *_of_files(bundle, base), *_of_layers(base))
    alone = tuple(change for change in every if change.total < base.total or change.fits)
    if any(change.fits for change in alone):
        return alone
    return (*alone, *_together(bundle, options, base, planned))


def _of_options(bundle: Bundle, options: LoadOptions, base: Plan, planned: Planned) -> Iterator[Change]:
    def change(what: str, how: str, changed: LoadOptions) -> Change:
        plan = planned(bundle, changed, base.machine)
        return Change(what, how, plan.total, plan.verdict == "fits")

    if base.in_memory:
        yield change("mapped weights", "--weights mapped", replace(options, weights="mapped"))
    if base.kv_type == "f16" and quantizes(bundle, options):
        yield change("a quantized KV cache", "--kv-type q8_0", replace(options, kv_type="q8_0"))
    contexts = smaller_contexts(base.n_ctx, shown_tokens(bundle, options))
    smaller = [change("a smaller context", f"--ctx {n}", replace(options, n_ctx=n)) for n in contexts]
    if smaller:
        yield next((one for one in smaller if one.fits), smaller[-1])


def _together(bundle: Bundle, options: LoadOptions, base: Plan, planned: Planned) -> Iterator[Change]:
    """Everything at once: the least that this model can take."""
    least = smaller_contexts(base.n_ctx, shown_tokens(bundle, options))[-1:]
    q8_0 = base.kv_type == "f16" and quantizes(bundle, options)
    how = [*(["--kv-type q8_0"] if q8_0 else []), *(f"--ctx {n}" for n in least)]
    changed = replace(options, kv_type="q8_0" if q8_0 else base.kv_type, n_ctx=[base.n_ctx, *least][-1])
    smallest = planned(bundle, changed, base.machine)
    last = list(_of_files(bundle, smallest))
    saved = sum(smallest.total - change.total for change in last)
    how += [change.how for change in last]
    if len(how) > 1:
        margin = min(room.margin for room in smallest.rooms)
        yield Change("all of it", ", ".join(how), smallest.total - saved, margin + saved >= 0)


def _of_files(bundle: Bundle, base: Plan) -> Iterator[Change]:
    """Other types in the files: the savings are exact for the vision tower and an estimate for the text model."""
    vision = sum(t.n_bytes for t in bundle.mmproj_header.tensors.values())
    saved = vision - vision_bytes_in(bundle, VISION_BYTES)
    if saved:
        yield _lighter(base, "a vision tower in Q8_0", "convert --mmproj Q8_0", saved, "vision tower")
    text = sum(t.n_bytes for t in bundle.model_header.tensors.values())
    savings = {quant: text - text_bytes_in(bundle, bits / 8) for quant, bits in TEXT_TYPES.items()}
    smaller = [
        _lighter(base, f"the text model in {quant}", f"convert --quant {quant}", saved, "weights")
        for quant, saved in savings.items()
        if saved * LEAST_SAVING > text
    ]
    if smaller:
        yield next((one for one in smaller if one.fits), smaller[-1])


def _lighter(base: Plan, what: str, how: str, saved: int, part: str) -> Change:
    """The plan with fewer bytes in a part."""
    where = {p.where for p in base.parts if p.name.startswith(part)}
    margins = [room.margin + (saved if room.where in where else 0) for room in base.rooms]
    return Change(what, how, base.total - saved, min(margins) >= 0)


def _of_layers(base: Plan) -> Iterator[Change]:
    """Layers that leave a device which has no room for them; the memory has to hold them then."""
    short = [room for room in base.rooms if room.margin < 0]
    layer = sum(p.n_bytes for p in base.parts if p.name == "weights" and short and p.where == short[0].where)
    if base.n_gpu_layers and layer and all(room.where == short[0].where for room in short):
        missing = -short[0].margin
        fewer = max(0, base.n_gpu_layers - 1 - missing * base.n_gpu_layers // layer)
        free = min(room.margin for room in base.rooms if room.where != short[0].where)
        yield Change("fewer layers on the device", f"--gpu-layers {fewer}", base.total, free > missing)


def shown_tokens(bundle: Bundle, options: LoadOptions) -> int:
    """Tokens of a picture."""
    return min(options.image_tokens or bundle.image_tokens, bundle.image_tokens)


def quantizes(bundle: Bundle, options: LoadOptions) -> bool:
    """Whether llama.cpp can hold the KV cache in Q8_0."""
    return options.flash_attn != "off" and bundle.text_info.head_size % Q8_0_BLOCK == 0

"""The planner: what loading a bundle takes on a machine, whether it fits, and what would make it fit.

Knows headers, options and a machine's figures; loads nothing. What the user left alone (n_ctx None, kv_type "auto",
n_gpu_layers -1, weights "auto") is chosen here; what was said is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from pocketllava.models.advice import Change, changes, quantizes, shown_tokens
from pocketllava.models.bundle import Bundle
from pocketllava.models.machine import Machine
from pocketllava.models.memory import Memory, context_size, memory, shares, smaller_contexts
from pocketllava.models.placement import FREE, MEMORY, REARRANGED, Part, Placement, Room
from pocketllava.models.taken_devices import text_devices, tower_device
from pocketllava.types import LoadOptions

Verdict = Literal["fits", "slow", "too large"]
MAX_KEPT = 16  # conversations in engine/prefix_cache.py: of a small model their bytes would hold thousands
MAX_KEPT_BYTES = 4 << 30  # a dozen pictures at 7B; llama-server's --cache-ram is twice as much
LEAST_KEPT = 2.5  # pictures: two, and what is said about them
# On CPUs flash attention shortens the wait for a new image's first token by a tenth and slows decoding behind it by a
# fifth: over a conversation it loses (benchmarks/README.md). On GPUs it helps both, but its F16 sums flipped 4 of 60
# greedy tokens of an F16 bundle: nothing beside a quantized type's own error, too much where tokens are promised.
EXACT = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Plan:
    """How a bundle will be loaded on a machine, and what that takes, in bytes.

    n_gpu_layers counts the output layer, as llama.cpp does, of n_layers. vision_device: where the vision tower goes,
    None for the CPU. kept: what conversations to go back to may take beyond the total; later: they, and a full
    context. chosen: what was not said and differs from the usual choice;
    changes: what would take less, in the order of harm, where it does not fit.
    """

    model: str
    n_ctx: int
    kv_type: str
    n_gpu_layers: int
    n_layers: int
    in_memory: bool
    flash_attention: bool
    vision_device: str | None
    machine: Machine
    parts: tuple[Part, ...]
    rooms: tuple[Room, ...]
    kept: int
    later: int
    chosen: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    def __str__(self) -> str:
        from pocketllava.models.plan_text import plan_lines

        return "\n".join(plan_lines(self))

    @property
    def total(self) -> int:
        """Bytes while the first picture is answered about, devices included."""
        return sum(part.n_bytes for part in self.parts)

    @property
    def releases_pages(self) -> bool:
        """Whether the pages of the mapped weights are let go of once they are copied."""
        copied = any(part.name == REARRANGED for part in self.parts)
        return copied and not self.in_memory and self.machine.releases_pages

    @property
    def tightest(self) -> Room:
        """The room with the least to spare."""
        return min(self.rooms, key=lambda room: room.margin)

    @property
    def decisive(self) -> Room:
        """The room that the verdict speaks of: where several are short, one beyond which the process would end."""
        short = [room for room in self.rooms if room.margin < 0] or [self.tightest]
        return min(short, key=lambda room: (not room.hard, room.name == FREE, room.margin))

    @property
    def refused(self) -> bool:
        """Whether llama.cpp would end the process."""
        return any(room.hard and room.margin < 0 for room in self.rooms)

    @property
    def is_tight(self) -> bool:
        """Whether something is short, or would be if the plan were a tenth too small."""
        return any(10 * room.margin < room.needed for room in self.rooms)

    @property
    def verdict(self) -> Verdict:
        """ "slow" where only pages of the mapped file find no room, which are then read again and again."""
        short = {room.name for room in self.rooms if room.margin < 0}
        return "too large" if short - {FREE} else "slow" if short else "fits"


def plan(bundle: Bundle, options: LoadOptions, machine: Machine) -> Plan:
    """How the bundle will be loaded, and whether it can be.

    Of what was not said, everything that changes no answer is tried before a quantized KV cache. Where nothing fits,
    the smallest is taken that llama.cpp may survive. Raises UnsupportedOption for a context that the model was not
    trained on.
    """
    usual, *others = _candidates(bundle, options)
    first = planned(bundle, usual, machine)
    plans = [first] if first.verdict != "too large" else [planned(bundle, o, machine) for o in others]
    fitting = (p for p in plans if p.verdict != "too large")
    surviving = (p for p in reversed(plans) if not p.refused)
    taken = next(chain(fitting, surviving, [first]))
    if taken.verdict == "fits":
        return replace(taken, chosen=_chosen(first, taken))
    said = replace(options, n_ctx=min(taken.n_ctx, bundle.text_info.n_ctx_train), kv_type=taken.kv_type)
    return replace(taken, chosen=_chosen(first, taken), changes=changes(bundle, said, taken, planned))


def flash_attention(bundle: Bundle, options: LoadOptions, on_gpu: bool) -> bool:
    """llama.cpp quantizes the KV cache's values with flash attention only."""
    if options.flash_attn != "auto" or options.kv_type == "q8_0":
        return options.flash_attn != "off"
    return on_gpu and not is_exact(bundle, options)


def is_exact(bundle: Bundle, options: LoadOptions) -> bool:
    """Whether the tokens are to be the reference's: as was said, else where no type rounds more than devices do."""
    return bundle.manifest.types.model in EXACT if options.exact is None else options.exact


def _candidates(bundle: Bundle, options: LoadOptions) -> Iterator[LoadOptions]:
    """What may be tried, the usual first."""
    kv_types = [options.kv_type]
    if options.kv_type == "auto":
        kv_types = ["f16", "q8_0"] if quantizes(bundle, options) else ["f16"]
    usual = context_size(options.n_ctx, bundle.text_info.n_ctx_train, bundle.image_tokens)
    contexts = [
        usual,
        *(smaller_contexts(usual, shown_tokens(bundle, options)) if options.n_ctx is None else []),
    ]
    for kv_type in kv_types:
        for n_ctx in contexts:
            yield replace(options, kv_type=kv_type, n_ctx=min(n_ctx, bundle.text_info.n_ctx_train))


def planned(bundle: Bundle, options: LoadOptions, machine: Machine) -> Plan:
    """The plan for one context and one type of the KV cache."""
    devices = text_devices(options, machine)
    flash = flash_attention(bundle, options, bool(devices))
    needed = memory(
        bundle,
        options.n_ctx,
        options.kv_type,
        flash=flash,
        rearranged_types=machine.rearranged,
        image_tokens=options.image_tokens,
    )
    tower = tower_device(options, machine, exact=is_exact(bundle, options))
    placed = Placement(needed, shares(bundle), machine, devices, tower)
    layers = placed.layers(options.n_gpu_layers)
    on_device = tower is not None and (options.mmproj_device is not None or placed.vision_fits(layers))
    in_memory = placed.in_memory(layers, options.weights)
    parts = placed.parts(layers, on_device, in_memory)
    rooms = placed.rooms(parts, in_memory)
    kept = options.kept_bytes if options.kept_bytes is not None else _kept(needed, rooms)
    return Plan(
        model=str(bundle.folder),
        n_ctx=needed.n_ctx,
        kv_type=options.kv_type,
        n_gpu_layers=layers,
        n_layers=placed.n_layers,
        in_memory=in_memory,
        flash_attention=flash,
        vision_device=tower.name if tower and on_device else None,
        machine=machine,
        parts=parts,
        rooms=rooms,
        kept=kept,
        later=needed.full + kept,
    )


def _kept(needed: Memory, rooms: tuple[Room, ...]) -> int:
    """Bytes for conversations to go back to: a quarter of what is left to memory, for two of them in any case."""
    left = min(room.margin for room in rooms if room.where == MEMORY) // 4
    most = min(MAX_KEPT_BYTES, MAX_KEPT * needed.kv_cache, left)
    return max(round(LEAST_KEPT * needed.prefix), most)


def _chosen(usual: Plan, taken: Plan) -> tuple[str, ...]:
    """What was not said, and differs from the usual choice."""
    named = (("n_ctx", usual.n_ctx, taken.n_ctx), ("kv_type", usual.kv_type, taken.kv_type))
    return tuple(f"{name} {b} instead of {a}" for name, a, b in named if a != b)

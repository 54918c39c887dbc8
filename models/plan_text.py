"""A plan in words: one screen for people, one line for an error. Knows plans; prints nothing."""

from __future__ import annotations

from pocketllava.models.advice import Change
from pocketllava.models.placement import MEMORY
from pocketllava.models.plan import Plan

SHOWN_CHANGES = 3  # in one line


def plan_lines(plan: Plan) -> list[str]:
    """The machine, every part, the total, whether it fits, and what would make it fit."""
    names = [part.name if part.where == MEMORY else f"{part.name}, on {part.where}" for part in plan.parts]
    width = max(map(len, [*names, *map(_named, plan.changes)]))
    rows = [
        f"  {name:<{width}}  {size(part.n_bytes):>9}" for name, part in zip(names, plan.parts, strict=True)
    ]
    later = f"later    up to {size(plan.later)} more, for a full context and conversations to go back to"
    return [
        f"model    {plan.model}",
        *(f"{'machine' if n == 0 else '':<9}{line}" for n, line in enumerate(_machine(plan))),
        *rows,
        f"  {'total':<{width}}  {size(plan.total):>9}",
        later,
        *(f"chosen   {chosen}" for chosen in plan.chosen),
        verdict(plan),
        *_advice(plan, width),
    ]


def verdict(plan: Plan) -> str:
    """Whether it fits, with what it has to spare or misses."""
    room = plan.decisive
    if plan.verdict == "fits":
        return f"fits: {size(room.margin)} to spare of {room.name}"
    if plan.verdict == "slow":
        return (
            f"fits, but slowly: {size(-room.margin)} of {room.name} are missing, so parts of the mapped weights are"
            " read again and again"
        )
    return f"too large: {size(-room.margin)} of {room.name} are missing"


def shortage(plan: Plan) -> str:
    """The same in one line, for an error or a warning: what is needed of which room, and what would take less."""
    room = plan.decisive
    advice = [f"{c.how} ({size(c.total)}{', fits' if c.fits else ''})" for c in _first(plan.changes)]
    return (
        f"{plan.model}: needs about {size(room.needed)} of memory, expected at most the {size(max(0, room.left))} that"
        f" {room.name} leaves{'; less is taken by ' + ', '.join(advice) if advice else ''}"
        f"; `pocketllava plan` shows every part"
    )


def size(n_bytes: int) -> str:
    """Bytes with a decimal unit: "4.08 GB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.2f} {unit}"
    return f"{n_bytes} B"


def _machine(plan: Plan) -> list[str]:
    machine = plan.machine
    swap = f", and {size(machine.swap)} of swap" if machine.swap else ""
    limits = [f"{limit.name} leaves {size(max(0, limit.left))}" for limit in machine.limits if limit.is_set]
    devices = [f"{d.name}: {size(d.free)} free of {size(d.total)}" for d in machine.devices]
    return [f"{machine.cpu}; {size(machine.free)} free now{swap}", *limits, *devices]


def _named(change: Change) -> str:
    return f"{change.what}: {change.how}"


def _advice(plan: Plan, width: int) -> list[str]:
    if not plan.changes:
        return []
    rows = [
        f"  {_named(c):<{width}}  {size(c.total):>9}  {'fits' if c.fits else 'not enough alone'}"
        for c in plan.changes
    ]
    return ["what would take less, the least harm first:", *rows]


def _first(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """Those that are enough, else the first ones."""
    return (tuple(c for c in changes if c.fits) or changes)[:SHOWN_CHANGES]

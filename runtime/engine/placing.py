"""Devices as they are found when they are tried, and what becomes of the parts that one has no room for.

Knows plans and what devices give; loads nothing. libmtmd ends the process where a device has no memory for the vision
tower, and ggml's backends where they have none to work with: so both are asked for before.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from pocketllava.errors import BackendError, OutOfMemory
from pocketllava.llamacpp.device_tests import allocatable, measured, offered
from pocketllava.llamacpp.devices import devices
from pocketllava.models import Bundle
from pocketllava.models.gguf_header import Header
from pocketllava.models.machine import Device, Machine
from pocketllava.models.memory import vision_bytes
from pocketllava.models.mmproj_contract import check_mmproj
from pocketllava.models.placement import MEMORY
from pocketllava.models.plan import Plan, is_exact, plan
from pocketllava.models.plan_text import size
from pocketllava.models.taken_devices import text_devices, tower_device
from pocketllava.types import LoadOptions

logger = logging.getLogger(__name__)


def tested(bundle: Bundle, options: LoadOptions, here: Machine) -> Machine:
    """The machine, with what the devices that the options take were found to give. Raises UnsupportedOption."""
    tower = tower_device(options, here, exact=False)
    taken = {device.name for device in (*text_devices(options, here), *([tower] if tower else []))}
    if not taken:
        return here
    exact = is_exact(bundle, options)
    here = _changed(
        here,
        {
            d.name: measured(d, bundle.manifest.types.mmproj, exact=exact)
            for d in here.devices
            if d.name in taken
        },
    )
    wanted = _wanted(plan(bundle, options, here))
    return _changed(here, {d.name: offered(d, wanted[d.name]) for d in here.devices if wanted.get(d.name)})


def _changed(here: Machine, changed: dict[str, Device]) -> Machine:
    return replace(here, devices=tuple(changed.get(device.name, device) for device in here.devices))


def _wanted(first: Plan) -> dict[str, int]:
    """Bytes of each device that a plan takes; of several, as llama.cpp spreads layers, by their free memory."""
    wanted: dict[str, int] = {}
    for room in first.rooms:
        held = [device for device in first.machine.devices if device.name in room.where.split(" + ")]
        free = sum(device.free for device in held)
        for device in held:
            share = device.free / free if free else 1 / len(held)
            wanted[device.name] = wanted.get(device.name, 0) + round(room.needed * share)
    return wanted


def device_shortage(first: Plan, options: LoadOptions, *, exact: bool) -> str | None:
    """What a device had no room for and was not asked to hold, in one line; None where all is there.

    exact: whether the vision tower was kept from devices that do not sum in F32.
    """
    taken = text_devices(options, first.machine)
    left = first.n_layers - first.n_gpu_layers if options.n_gpu_layers == -1 else 0
    layers = f"{left} of {first.n_layers} layers" if left else ""
    kept = options.mmproj_device is not None or (exact and not all(d.sums_in_f32 for d in taken[:1]))
    tower = "the vision tower" if not (first.vision_device or kept) else ""
    if not taken or not (layers or tower):
        return None
    names, free = _names(taken), sum(device.free for device in taken)
    return (
        f"{first.model}: {names} has {size(free)} free, too little for {' and '.join(filter(None, [layers, tower]))}"
        ", which the CPU computes instead"
    )


def _names(taken: Sequence[Device]) -> str:
    return " + ".join(device.name for device in taken)


def vision_device(fitted: Plan, options: LoadOptions) -> Device | None:
    """Where the vision tower goes, now that the text model is loaded.

    Raises OutOfMemory for a device that was asked for, BackendError where the text model's has nothing to work with.
    """
    for device in fitted.machine.devices:
        if device.name == fitted.vision_device and _has_room(device, fitted, options):
            return device
    if not has_room_to_work(fitted, options):
        raise BackendError(
            f"{fitted.model}: no memory left to compute with beside {fitted.n_gpu_layers} layers on"
            f" {_names(text_devices(options, fitted.machine))}; give fewer n_gpu_layers, or -1"
        )
    return None


def require_named(first: Plan, options: LoadOptions) -> None:
    """Raise OutOfMemory where the vision tower was asked onto a device that has no room for it."""
    if options.mmproj_device is None or first.vision_device is None:
        return
    for room in first.rooms:
        if first.vision_device in room.where.split(" + ") and room.margin < 0:
            raise OutOfMemory(
                f"{first.model}: mmproj_device {first.vision_device} has {size(room.left)} free, expected"
                f" {size(room.needed)}; take 'cpu', or leave it out",
                room.needed, room.left, str(first),
            )  # fmt: skip


def has_room_to_work(fitted: Plan, options: LoadOptions) -> bool:
    """Whether the text model's devices have what a context takes by itself while it computes."""
    work = sum(part.n_bytes for part in fitted.parts if part.name == "work memory")
    devices = text_devices(options, fitted.machine) if work else ()
    return all(allocatable(device, work) == work for device in devices)


def _has_room(device: Device, fitted: Plan, options: LoadOptions) -> bool:
    """Whether the vision tower finds room beside what the text model will still take. Raises OutOfMemory."""
    names = ("vision tower", "work memory")
    wanted = sum(p.n_bytes for p in fitted.parts if p.where != MEMORY and p.name.startswith(names))
    if (given := allocatable(device, wanted)) == wanted:
        return True
    reason = f"{fitted.model}: the vision tower needs {size(wanted)} of {device.name}, which has {size(given)} left"
    if options.mmproj_device is not None:
        raise OutOfMemory(f"{reason}; take mmproj_device='cpu'", wanted, given, str(fitted))
    logger.warning("%s: it runs on the CPU", reason)
    return False


def device_beside(header: Header, kind: str, *, exact: bool) -> Device | None:
    """The first device that has room for a vision tower, and sums as exactly as was asked; None for the CPU.

    kind: the type of its weights.
    """
    for device in devices():
        wanted = vision_bytes(header, check_mmproj(header))
        tried = measured(device, kind, exact=exact)
        if (tried.sums_in_f32 or not exact) and allocatable(tried, wanted) == wanted:
            return tried
    return None


def text_kind(fitted: Plan, options: LoadOptions) -> str:
    """The kinds of devices that hold layers, and their shares; "" for the CPU."""
    if not fitted.n_gpu_layers:
        return ""
    kinds = [device.kind for device in text_devices(options, fitted.machine)]
    return repr((kinds, options.tensor_split))

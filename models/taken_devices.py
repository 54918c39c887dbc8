"""Which of a machine's devices the options take: for the layers of the text model, and for the vision tower.

Knows names and figures; whether there is room is placement.py's.
"""

from __future__ import annotations

from pocketllava.errors import UnsupportedOption
from pocketllava.models.machine import Device, Machine
from pocketllava.types import LoadOptions

CPU = "cpu"


def text_devices(options: LoadOptions, machine: Machine) -> tuple[Device, ...]:
    """Those that layers may go to: all, or main_gpu alone. Raises UnsupportedOption."""
    if options.n_gpu_layers == 0:
        return ()
    if options.tensor_split is not None and len(options.tensor_split) > len(machine.devices):
        raise UnsupportedOption(
            f"tensor_split: found {len(options.tensor_split)} shares, expected at most one for each of"
            f" {_named(machine)}"
        )
    if options.main_gpu is None:
        return machine.devices
    if options.main_gpu >= len(machine.devices):
        raise UnsupportedOption(
            f"main_gpu: found {options.main_gpu}, expected the number of {_named(machine)}"
        )
    return (machine.devices[options.main_gpu],)


def tower_device(options: LoadOptions, machine: Machine, *, exact: bool) -> Device | None:
    """The vision tower's: what was named, else the text model's first, unless it is to be exact and is not there.

    Raises UnsupportedOption.
    """
    name = options.mmproj_device
    if name is None:
        first = next(iter(text_devices(options, machine)), None)
        return None if first is None or (exact and not first.sums_in_f32) else first
    if name.lower() == CPU:
        return None
    for device in machine.devices:
        if name.lower() in (device.name.lower(), device.short_name.lower()):
            return _allowed(device, options)
    raise UnsupportedOption(f"mmproj_device: found {name!r}, expected 'cpu' or the name of {_named(machine)}")


def _allowed(device: Device, options: LoadOptions) -> Device:
    if options.exact and not device.sums_in_f32:
        raise UnsupportedOption(
            f"exact: {device.name}, found sums in F16, expected F32; take mmproj_device='cpu', or leave exact out"
        )
    return device


def _named(machine: Machine) -> str:
    """ "CUDA0 (a card), CUDA1 (another)"."""
    names = [device.name for device in machine.devices]
    return f"one of {', '.join(names)}" if names else "a device, of which this llama.cpp has none"

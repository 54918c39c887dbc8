"""How far a device moves a picture's features from the CPU's, as the model would be loaded there.

Knows sessions and devices; prints nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pocketllava.engine.session import Session
    from pocketllava.models.machine import Device
    from pocketllava.types import ImageSource


@dataclass(frozen=True)
class DeviceDrift:
    """error: ||device - CPU|| / ||CPU|| over all of a picture's tiles; None where it found no room for the tower.

    sums_in_f32: whether products there are as exact as the CPU's; taken: whether the vision tower goes there unasked.
    """

    device: str
    error: float | None
    sums_in_f32: bool
    taken: bool


def device_drift(session: Session, image: ImageSource) -> list[DeviceDrift]:
    """For each device that llama.cpp would use. session: one whose vision tower is on the CPU. Raises ImageError."""
    from pocketllava.llamacpp.device_tests import measured
    from pocketllava.llamacpp.devices import devices

    exact, bundle = session.is_exact, session.bundle
    kind = bundle.manifest.types.mmproj if bundle else "F16"
    return [_drift(session, image, measured(device, kind, exact=exact), exact=exact) for device in devices()]


def _drift(session: Session, image: ImageSource, device: Device, *, exact: bool) -> DeviceDrift:
    from pocketllava.llamacpp.device_tests import allocatable
    from pocketllava.models.memory import vision_bytes
    from pocketllava.vision.encoder import VisionEncoder

    text, here = session.text, session.vision
    wanted = vision_bytes(here.header, here.info)
    taken = device.sums_in_f32 or not exact
    if allocatable(device, wanted) < wanted:
        return DeviceDrift(device.name, None, device.sums_in_f32, taken=False)
    encoder = VisionEncoder(
        here.header, text.model, n_threads=text.n_threads, n_embd=text.n_embd, device=device, exact=exact
    )
    try:
        tiles = session.images.process(image).tiles
        right, there = (np.concatenate([e.encode(tile) for tile in tiles]) for e in (here, encoder))
    finally:
        encoder.close()
    error = float(np.linalg.norm(there - right) / np.linalg.norm(right))
    return DeviceDrift(device.name, error, device.sums_in_f32, taken)

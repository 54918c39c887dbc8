"""What a bundle needs, laid out over a machine: which part is where, and what of each room it takes.

Knows the figures of models/memory.py and models/machine.py; not what was asked for, nor what would take less.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketllava.models.limits import OVERHEAD_BYTES, THREAD_BYTES
from pocketllava.models.machine import Device, Machine
from pocketllava.models.memory import Memory, Shares

MEMORY = "memory"  # where a part is that no device holds
DEVICE_MARGIN = 1 << 30  # what llama.cpp's own fitting leaves free on a device; a tenth of small ones here
REARRANGED = "weights, rearranged copy"
FREE, FREE_AND_SWAP = "free memory", "free memory and swap"


@dataclass(frozen=True)
class Part:
    """A part of what is taken, where ("memory" or a device), and how many bytes.

    dropped: pages of a mapped file, which the system drops where memory is short, and reads again.
    """

    name: str
    where: str
    n_bytes: int
    dropped: bool = False


@dataclass(frozen=True)
class Room:
    """One thing that must hold the model: bytes that are left of it, and bytes that are needed of it.

    hard: beyond it llama.cpp ends the process. where: as a part's.
    """

    name: str
    left: int
    needed: int
    hard: bool = False
    where: str = MEMORY

    @property
    def margin(self) -> int:
        """Bytes to spare; negative where they are missing."""
        return self.left - self.needed


@dataclass(frozen=True)
class Placement:
    """What is needed, laid out over a machine's memory and devices.

    devices: those that layers may go to; tower: the one that the vision tower goes to if it fits, None for the CPU.
    """

    needed: Memory
    shares: Shares
    machine: Machine
    devices: tuple[Device, ...]
    tower: Device | None

    @property
    def n_layers(self) -> int:
        return len(self.shares.blocks) + 1

    @property
    def _device(self) -> str:
        """All of them: llama.cpp spreads the layers over them as they have room."""
        return " + ".join(device.name for device in self.devices) or MEMORY

    @property
    def _tower(self) -> str:
        if self.tower is None:
            return MEMORY
        return self._device if self.tower in self.devices else self.tower.name

    def _held_by(self, where: str) -> tuple[Device, ...]:
        """The devices that a part's place stands for."""
        if where == self._device:
            return self.devices
        return (self.tower,) if self.tower is not None and where == self._tower else ()

    def layers(self, asked: int) -> int:
        """Layers on the device: as many as were asked for, or (-1) as fit it together with the vision tower."""
        if not self.devices:
            return 0
        if asked >= 0:
            return min(asked, self.n_layers)
        fitting = (n for n in range(self.n_layers, 0, -1) if self._fits(n, self._device))
        return next(fitting, 0)

    def vision_fits(self, layers: int) -> bool:
        """Whether the vision tower goes to its device beside so many layers."""
        return self.tower is not None and self._fits(layers, self._tower)

    def _fits(self, layers: int, where: str) -> bool:
        """Whether a place holds its parts, and leaves a margin."""
        held = sum(part.n_bytes for part in self.parts(layers, True, False) if part.where == where)
        return held <= sum(d.free - min(DEVICE_MARGIN, d.total // 10) for d in self._held_by(where))

    def in_memory(self, layers: int, weights: str) -> bool:
        """Whether the text model's weights are read into memory rather than mapped.

        Many CPUs compute with a rearranged copy of quantized weights, beside which the mapped file may stay
        resident: 7.9 GB instead of 5.0 for a 7B model in Q4_K_M. The map is better where its pages are let go of as
        they are copied (Linux): it loads a 7B model in half the time, and takes as much. It also is where memory is
        short, because its pages can be dropped, and where weights are used in the file's own layout (F16, GPUs but for
        integrated ones, whose copy is in the same memory; llama.cpp's automatic choice, LLAMA_LOAD_MODE_AUTO).
        """
        if weights != "auto":
            return weights == "memory"
        if layers:
            return not all(device.maps for device in self.devices)
        if not self.needed.mostly_rearranged:
            return False
        if self.machine.releases_pages and self._spare(layers, in_memory=False) >= 0:
            return False
        spare = self._spare(layers, in_memory=True)
        return spare >= min(0, self._spare(layers, in_memory=False))

    def _spare(self, layers: int, *, in_memory: bool) -> int:
        """Of the tightest room."""
        rooms = self.rooms(self.parts(layers, False, in_memory), in_memory)
        return min(room.margin for room in rooms)

    def parts(self, layers: int, vision_on_gpu: bool, in_memory: bool) -> tuple[Part, ...]:
        """Every part, the large ones first."""
        n, device = self.needed, self._device
        n_blocks = max(0, layers - 1)
        vision_on_gpu = vision_on_gpu and self.tower is not None
        on_device = self.shares.last(layers)
        kv = n.kv_cache * n_blocks // max(1, self.n_layers - 1)
        tower = self._tower if vision_on_gpu else MEMORY
        buffers = n.buffers + n.reserved
        parts = [
            Part("weights", device, on_device),
            *self._weights(self.needed.text - on_device, layers, in_memory),
            Part("vision tower", tower, n.vision),
            Part("vision tower's buffers", tower, n.vision_buffers),
            Part(f"KV cache, {n.n_ctx} tokens in {n.kv_type}", device, kv),
            Part(f"KV cache, {n.n_ctx} tokens in {n.kv_type}", MEMORY, n.kv_cache - kv),
            Part("buffers", device, buffers if layers else 0),
            Part("work memory", device, n.work if layers else 0),
            Part("vision tower's work memory", tower, n.vision_work if vision_on_gpu else 0),
            Part("buffers", MEMORY, n.buffers if layers < self.n_layers else 0),
            Part("a picture's features", MEMORY, n.picture),
            Part("vocabulary", MEMORY, n.vocabulary),
            Part("Python and libraries", MEMORY, n.process),
        ]
        return tuple(part for part in parts if part.n_bytes > 0)

    def _weights(self, n_bytes: int, layers: int, in_memory: bool) -> list[Part]:
        """The weights that no device holds."""
        if in_memory:
            return [Part("weights", MEMORY, n_bytes)]
        copied = 0 if layers else self.needed.rearranged
        gone = copied + self.needed.looked_up if copied and self.machine.releases_pages else 0
        return [
            Part("weights, mapped", MEMORY, n_bytes - gone, dropped=True),
            Part(REARRANGED, MEMORY, copied),
        ]

    def rooms(self, parts: tuple[Part, ...], in_memory: bool) -> tuple[Room, ...]:
        """Everything that must hold the parts."""
        unified = any(device.unified for part in parts for device in self._held_by(part.where))
        here = [part for part in parts if part.where == MEMORY or unified]
        total = sum(part.n_bytes for part in here)
        written = total - sum(part.n_bytes for part in here if part.dropped)
        used = written - self.needed.process  # which this process has already
        mapped = 0 if in_memory else self.needed.text
        reserved = self.needed.reserved + OVERHEAD_BYTES + self.machine.n_threads * THREAD_BYTES
        rooms = [
            Room(FREE, self.machine.free, total),
            Room(FREE_AND_SWAP, self.machine.free + self.machine.swap, written),
        ]
        for limit in self.machine.limits:
            needed = used + limit.counts_mapped * mapped + limit.counts_reserved * reserved
            rooms.append(Room(limit.name, limit.left, needed, hard=True))
        for where in dict.fromkeys(part.where for part in parts if part.where != MEMORY):
            held = sum(part.n_bytes for part in parts if part.where == where)
            free = sum(device.free for device in self._held_by(where))
            rooms.append(Room(f"{where}'s free memory", free, held, where=where))
        return tuple(rooms)

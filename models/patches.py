"""How a square picture is cut into patches. Knows nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PatchGrid:
    """image_size and patch_size in pixels, of a square picture."""

    image_size: int
    patch_size: int

    @property
    def grid(self) -> int:
        """Patches along one side: 336 // 14 = 24."""
        return self.image_size // self.patch_size

    @property
    def n_patches(self) -> int:
        """Image tokens of one picture: 24 * 24 = 576."""
        return self.grid**2

"""What a model on disk is: bundles, GGUF headers, memory. Knows no engine and loads nothing.

Bundle is imported when it is first used: listing the store takes file names only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocketllava.models.bundle import Bundle

__all__ = ["Bundle"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name != "Bundle":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from pocketllava.models.bundle import Bundle

        globals()[name] = Bundle
        return Bundle

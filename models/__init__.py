"""Which models there are, where they lie, and whether they are whole. Knows no engine."""

from pocketllava.models.bundle import Bundle

__all__ = ["Bundle"]

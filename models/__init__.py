"""What a model on disk is: bundles, GGUF headers, memory. Knows no engine and loads nothing."""

from pocketllava.models.bundle import Bundle

__all__ = ["Bundle"]

"""The hub's models into the store: what is there, which files, their bytes. Knows HTTP; loads nothing."""

from pocketllava.download.pull import Pulled, pull

__all__ = ["Pulled", "pull"]

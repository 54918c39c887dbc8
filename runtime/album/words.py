"""{name}, {directory} and {tags} in a prompt, a prefix or a suffix -> a picture's own words. Opens sidecars only.

Tags are what a tagger left beside the picture, where kohya's trainers and TagGUI keep them: photo.txt, photo.caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pocketllava.errors import InputError
from pocketllava.models.files import read_regular, text_of, utf8

SIDECARS = (".txt", ".caption")
MAX_BYTES = 64 << 10  # of a sidecar
MAX_TAGS = 1000  # characters
TAGS = "{tags}"
_WORD = re.compile(r"\{(name|directory|tags)\}")


def has_words(text: str) -> bool:
    """Whether a text is another one for each picture."""
    return _WORD.search(text) is not None


def filled(text: str, file: Path, tags: str) -> str:
    """A text with the words of a picture in their places; those of its folder are the last part of its path."""
    words = {"name": _line(file.stem), "directory": _line(file.parent.name), "tags": tags}
    return _WORD.sub(lambda match: words[match[1]], text)


def read_tags(file: Path, sidecars: Sequence[str] = SIDECARS) -> str:
    """The first MAX_TAGS characters of a picture's tags, in one line; nothing where there are none.

    Raises InputError for a sidecar that is no text.
    """
    for suffix in sidecars:
        path = file.with_suffix(suffix)
        try:
            return _shortened(_line(text_of(read_regular(path, MAX_BYTES))))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path}: cannot be read as tags ({reason}), expected a line of text") from error
    return ""


def _line(text: str) -> str:
    return " ".join(utf8(text).split())


def _shortened(tags: str) -> str:
    """Whole tags, as far as there is room."""
    if len(tags) <= MAX_TAGS:
        return tags
    whole, comma, _ = tags[: MAX_TAGS + 1].rpartition(",")
    return whole if comma else tags[:MAX_TAGS]

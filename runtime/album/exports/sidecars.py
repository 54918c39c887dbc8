"""A text file beside each picture, as kohya's trainers and TagGUI read it: photo.txt for photo.jpg, one line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pocketllava.album.exports.captions import Beside, Style
from pocketllava.album.journal import Row
from pocketllava.errors import InputError
from pocketllava.models.files import atomic_write, read_text


def check_collisions(folders: Iterable[tuple[str, Iterable[str]]]) -> None:
    """Raise InputError for two pictures of a folder whose captions would be one file."""
    for folder, names in folders:
        seen: dict[str, str] = {}
        for name in names:
            stem = os.path.splitext(name)[0].casefold()  # noqa: PTH122 - of a million names
            if stem in seen:
                raise InputError(
                    f"{Path(folder, name)}: its caption would be the same file as that of {seen[stem]}; rename one of"
                    " them, or take another --out"
                )
            seen[stem] = name


class Sidecars(Beside):
    """Text files of one suffix, ".txt" or ".caption"."""

    def __init__(self, style: Style, suffix: str) -> None:
        super().__init__(style)
        self._suffix = suffix

    def put(self, row: Row, caption: str) -> None:
        path = row.file.with_suffix(self._suffix)
        if path.exists():
            if self.style.existing == "skip":
                self.report.kept += 1
                return
            caption = _with_old(path, caption, self.style)
        try:
            with atomic_write(path) as part:
                part.write_text(caption, "utf-8", newline="")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
        self.report.written += 1


def _with_old(path: Path, caption: str, style: Style) -> str:
    """The caption beside what is there; once only, so that the same command can be run again."""
    if style.existing == "overwrite":
        return caption
    try:
        old = " ".join(read_text(path).split())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); --existing overwrite replaces it") from error
    if style.existing == "append":
        return old if old.endswith(caption) else f"{old} {caption}".strip()
    return old if old.startswith(caption) else f"{caption} {old}".strip()

"""A line that a person typed, pasted or dragged files into -> image paths, and the rest of the line.

Knows quoting and the file system, and opens nothing. A word that ends as images do is an image: a file, or a
complaint, but never text, because a model answers about pictures that it was not shown. Terminals drag files in as
quoted or escaped paths, as bare paths with spaces, or as file URLs.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import unquote_to_bytes

from pocketllava.errors import InputError
from pocketllava.models.files import expanded

WINDOWS = os.name == "nt"
MAX_CHARACTERS = 1024  # of a path, as typed
MAX_COMPLAINTS = 20
MAX_ENDS = 8  # extensions tried for one name, which may hold ".png " in its middle
# Formats that are opened, then those that the image loader names in its error.
_EXTENSION = (
    r"\.(?:png|jpe?g|webp|gif|bmp|tiff?|heic|heif|hif|avif"
    r"|apng|jpe|jfif|mpo|dib|jp2|j2[kc]|jp[cfx]|jx[lr]|ico|icns|cur|svgz?|psd|xcf|p[bgpn]m|tga|dds|exr|hdr|pcx|qoi|wmf|emf"
    r"|dng|cr[23w]|nef|arw|orf|rw2|raf)"
)
_PUNCTUATION = ".,;:!?)]}>"  # what may follow a path
_CLOSING = rf"[{re.escape(_PUNCTUATION)}]*"
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_FILE_URL = re.compile(r"file:/", re.I)
_IS_IMAGE = re.compile(rf".*{_EXTENSION}", re.I | re.S)
_END = re.compile(rf"{_EXTENSION}(?=['\"]|{_CLOSING}(?:\s|$))", re.I)
# Where a path may begin: at a word, behind its brackets, or, absolute, behind a word's quote or punctuation.
_START = re.compile(
    r"(?:^|(?<=\s))(?=\S)|(?<=[(\[{<])(?=[^\s(\[{<])"
    r"|(?<=\S)(?=['\"](?:[/\\~]|file:|[A-Za-z]:[\\/]))|(?<=[?!.,;)'\"])(?=[/~]|file:|[A-Za-z]:[\\/])"
)
# Such an ending of any name, wherever it stands: "(see photo.jpg)", "photo.jpg's", a shell's "photo\.jpg", but not
# "photo.jpg.txt" or ".jpg".
_LOOKS = re.compile(
    rf"[^\s.(\[{{<'\"`*/\\,;:]\\?{_EXTENSION}(?![A-Za-z0-9_])(?!(?-i:\.[a-z0-9]{{1,5}}\b))", re.I
)
_DATA_URI = re.compile(r"(?<![A-Za-z0-9])data:image/", re.I)
_WORD = re.compile(
    rf"(?<!\S)[(\[{{<]*(?:'[^'\n]+'(?={_CLOSING}(?:\s|$))|\"[^\"\n]+\"(?={_CLOSING}(?:\s|$))|(?:\\.|\S)+)"
)


@dataclass(frozen=True)
class ImagePaths:
    """A line's text without image paths, the paths of its images, and a complaint for each missing file."""

    text: str
    images: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()


def find_images(line: str, *, windows: bool = WINDOWS) -> ImagePaths:
    """Image paths anywhere in a line, in order, and the text around them."""
    spans: list[tuple[int, int]] = []
    images: list[Path] = []
    position = 0
    for start in [m.start() for m in _START.finditer(line)] if _END.search(line) else []:
        if start >= position and (file := _first_file(line, start, windows)):
            end, path = file
            between = line[position:start].strip(" \t\r\n,;&" if spans else " ")
            spans.append((position if between in ("", "&") else start, end))  # PowerShell drags "& 'C:\...'"
            images.append(path)
            position = end
    return ImagePaths(
        _without(line, spans), tuple(images), tuple(islice(_missing(line, spans, windows), MAX_COMPLAINTS))
    )


def image_arguments(text: str, *, windows: bool = WINDOWS) -> tuple[Path, ...]:
    """The images of a command's argument, which holds nothing else. Raises InputError for a missing one."""
    line = find_images(text, windows=windows)
    if line.images and not line.text and not line.missing:
        return line.images
    if is_file(whole := one_path(text, windows=windows)):
        return (whole,)
    if line.missing:
        raise InputError(line.missing[0])
    raise InputError(
        f"{(line.text if line.images else text).strip()}: no such file, expected an image's path"
    )


def one_path(text: str, *, windows: bool = WINDOWS) -> Path:
    """The path of a command's argument: quoted, escaped or bare, with its spaces."""
    paths = [_as_path(value) for value in _readings(text.strip(), windows)]
    return next((path for path in paths if is_file(path)), paths[0])


def is_file(path: Path) -> bool:
    """Whether there is such a file. A text that cannot be a path is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, a null character, a folder that may not be looked into
        return False


def _first_file(line: str, start: int, windows: bool) -> tuple[int, Path] | None:
    """The end and the path of the shortest name of an image file that begins at `start`."""
    newline = line.find("\n", start)
    limit = min(start + MAX_CHARACTERS, len(line) if newline < 0 else newline)
    for m in islice(_END.finditer(line, start, limit), MAX_ENDS):
        closed = line[m.end() : m.end() + 1] in ("'", '"') and line[start] in "'\""
        for end in (m.end() + 1, m.end()) if closed else (m.end(),):
            for value in _readings(line[start:end], windows):
                if _IS_IMAGE.fullmatch(value) and is_file(path := _as_path(value)):
                    return end, path
    return None


def _readings(typed: str, windows: bool) -> Iterator[str]:
    """The paths that a typed text may mean, the likeliest first."""
    quoted = len(typed) > 1 and typed[0] in "'\"" and typed[-1] == typed[0]
    if not windows and not _DRIVE.match(typed) and any(c in typed for c in "\\'\""):
        yield from _shell_words(typed)
    if quoted:
        yield typed[1:-1]
        yield typed[1:-1].replace(typed[0] * 2, typed[0])  # PowerShell's way to write a quote
    else:
        yield typed


def _shell_words(typed: str) -> list[str]:
    """The word that a POSIX shell reads; nothing if it reads several, or none."""
    try:
        words = shlex.split(typed)
    except ValueError:  # a quote that nothing closes
        return []
    return words if len(words) == 1 else []


def _as_path(value: str) -> Path:
    return Path(_from_url(value)) if _FILE_URL.match(value) else expanded(value)


def _from_url(url: str) -> str:
    """The path of a file URL; terminals write file:///path, file://localhost/path and file:/path."""
    rest = url[len("file:") :]
    host, _, path = rest[2:].partition("/") if rest.startswith("//") else ("", "", rest[1:])
    decoded = os.fsdecode(unquote_to_bytes(path))
    if WINDOWS and host not in ("", "localhost"):
        return f"//{host}/{decoded}"
    return decoded if _DRIVE.match(decoded) else "/" + decoded


def _without(line: str, spans: list[tuple[int, int]]) -> str:
    """The line without these spans, one space or nothing where each was."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(line)]
    text = ""
    for start, end in zip(ends, starts, strict=True):
        text = _joined(text, line[start:end])
    return text.strip()


def _joined(left: str, right: str) -> str:
    bare_left, bare_right = left.rstrip(" \t"), right.lstrip(" \t")
    if bare_left[-1:] in ("", "\n") and bare_right[:1] == "\n":
        return bare_left + bare_right[1:]  # the image had a line of its own
    tight = right == bare_right and (left == bare_left or right.startswith(tuple(_PUNCTUATION)))
    return bare_left + ("" if tight or not bare_right or not bare_left else " ") + bare_right


def _missing(line: str, spans: list[tuple[int, int]], windows: bool) -> Iterator[str]:
    """A complaint for each word outside the spans that looks like an image's path."""
    if _DATA_URI.search(line):
        yield "data URI: found in a message, expected behind /image"
    last = -1
    for m in _LOOKS.finditer(line):
        if any(start < m.end() and m.start() < end for start, end in spans) or m.end() <= last:
            continue
        word = _word_at(line, m.start())
        last = word.end() if word else m.end()
        typed = word[0].lstrip("([{<").rstrip(_PUNCTUATION) if word else m[0]
        value = next(_readings(typed, windows), "").strip("'\"")
        if _URL.match(value) and not _FILE_URL.match(value):
            yield f"{value}: URLs are not opened, save the image and give its path"
        else:
            yield f"{value}: {_state(value)}"


def _word_at(line: str, position: int) -> re.Match[str] | None:
    """The word around a position, which may be quoted."""
    return next((w for w in _WORD.finditer(line) if w.start() <= position < w.end()), None)


def _state(value: str) -> str:
    """What stands in an image's place."""
    try:
        path = _as_path(value)
        if path.is_dir():
            return "a folder, expected an image"
        return "a pipe or device, expected an image" if path.exists() else "no such file"
    except (OSError, ValueError):  # too long, a null character, a folder that may not be looked into
        return "no such file"

"""Image paths in typed, pasted and dragged lines: found however they are written, with the text around them kept."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketllava.chat.image_paths import ImagePaths, find_images, image_arguments, one_path

WINDOWS = os.name == "nt"
NOT_IN_NAMES = '/\\<>:"|?*' if WINDOWS else "/"
NAMES = st.builds(
    str.__add__,
    st.text(
        st.characters(exclude_categories=("Cc", "Cs"), exclude_characters=NOT_IN_NAMES),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([".png", ".JPG", ".jpeg", ".webp", ".Gif", ".bmp", ".tif", ".TIFF"]),
)
WORDS = st.lists(
    st.sampled_from(["what's", "in", "don't", "(see", "here)", '5"', "größer", "a/b", "&", "1.png2", "?"])
)
POSIX: list[Callable[[str], str]] = [
    str,
    shlex.quote,
    lambda path: "'" + path.replace("'", "'\\''") + "'",
    lambda path: '"' + re.sub(r'(["\\])', r"\\\1", path) + '"',
    lambda path: re.sub(r"([^\w@%+=:,./-])", r"\\\1", path, flags=re.ASCII),
    lambda path: Path(path).as_uri(),
    lambda path: f"'{Path(path).as_uri()}'",
]
POWERSHELL: list[Callable[[str], str]] = [
    str,
    lambda path: "'" + path.replace("'", "''") + "'",
    lambda path: '"' + path.replace('"', '""') + '"',
    lambda path: Path(path).as_uri(),
]
STYLES = [(style, False) for style in POSIX] + [(style, True) for style in POWERSHELL]


@settings(max_examples=300)
@given(NAMES, WORDS, WORDS, st.sampled_from(STYLES[7:] if WINDOWS else STYLES))
def test_a_file_is_found_however_it_is_quoted(
    name: str, before: list[str], after: list[str], style: tuple[Callable[[str], str], bool]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.touch()
        quoted, windows = style
        before = before if before != ["&"] else []  # PowerShell's, not a text
        found = find_images(" ".join([*before, quoted(str(path)), *after]), windows=windows)
        assert found == ImagePaths(" ".join([*before, *after]), (path,))
        assert image_arguments(quoted(str(path)), windows=windows) == (path,)
        assert one_path(quoted(str(path)), windows=windows) == path


@pytest.mark.parametrize(
    ("line", "text", "images"),
    [
        ("what is in a.png?", "what is in?", ["a.png"]),
        ("a.png, 'my photo.jpg' and b.PNG", "and", ["a.png", "my photo.jpg", "b.PNG"]),
        ("describe my photo.jpg please", "describe please", ["my photo.jpg"]),
        ("~/a.png what?", "what?", ["HERE/a.png"]),
        ("what?HERE/a.png", "what?", ["HERE/a.png"]),
        ("is this'HERE/my photo.jpg' red", "is this red", ["HERE/my photo.jpg"]),
        ("& 'a.png' what?", "what?", ["a.png"]),
        ("& 'a.png' & 'b.PNG'", "", ["a.png", "b.PNG"]),
        ("file://localhostHERE/my%20photo.jpg", "", ["HERE/my photo.jpg"]),
        ("first\na.png\nlast", "first\nlast", ["a.png"]),
        ("(a.png) it's", "() it's", ["a.png"]),
        ("c.png is no file", "c.png is no file", []),
        ("nothing at all", "nothing at all", []),
        ("a.pngx and a.txt", "a.pngx and a.txt", []),
    ],
)
def test_what_a_line_holds(here: Path, line: str, text: str, images: list[str]) -> None:
    place = here.as_posix() if not WINDOWS else "/" + here.as_posix()
    found = find_images(line.replace("localhostHERE", f"localhost{place}").replace("HERE", str(here)))
    assert found == ImagePaths(text, tuple(Path(i.replace("HERE", str(here))) for i in images))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("./c.png what?", "./c.png: no such file"),
        ("'~/my c.png', what?", "~/my c.png: no such file"),
        (r"C:\pictures\c.png", r"C:\pictures\c.png: no such file"),
        ("file:///nowhere/c.png", "file:///nowhere/c.png: no such file"),
        (
            "see https://example.com/c.png",
            "https://example.com/c.png: URLs are not opened, save the image and give its path",
        ),
        ("a.png and x/c.png", "x/c.png: no such file"),
    ],
)
def test_a_path_that_is_not_there_is_told(here: Path, line: str, complaint: str) -> None:
    assert find_images(line).missing == (complaint,)


def test_drive_letters_are_read_without_escapes(here: Path) -> None:
    if not WINDOWS:  # where a file may have such a name, which is how it can be tried
        (here / r"C:\my files\a.png").touch()
        for line in (r"& 'C:\my files\a.png' what", r'"C:\my files\a.png" what', r"C:\my files\a.png what"):
            for windows in (True, False):
                assert find_images(line, windows=windows) == ImagePaths("what", (Path(r"C:\my files\a.png"),))


@given(st.text())
def test_any_line_can_be_read(line: str) -> None:
    for windows in (True, False):
        find_images(line, windows=windows)
        one_path(line, windows=windows)

"""Image paths in typed, pasted and dragged lines: found however they are written, with the text around them kept."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pocketllava import ImageError
from pocketllava.chat.dialogue import Dialogue, Gallery
from pocketllava.chat.image_paths import ImagePaths, find_images, image_arguments, one_path
from pocketllava.chat.slash import handle
from pocketllava.vision.image import load

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
        ("is .png better than .jpg, or a.txt?", "is .png better than .jpg, or a.txt?", []),
        ("photo.jpg.txt and a_png", "photo.jpg.txt and a_png", []),
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
        ("c.png is no file", "c.png: no such file"),
        ("what's in folder.png?", "folder.png: a folder, expected an image"),
        ("is it data:image/png;base64,AAAA?", "data URI: found in a message, expected behind /image"),
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
    (here / "folder.png").mkdir()
    assert find_images(line).missing == (complaint,)


SUFFIXES = [
    "png",
    "JPG",
    "jpeg",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "heic",
    "HEIF",
    "avif",
    "jp2",
    "j2k",
    "jxl",
    "ico",
    "svg",
    "psd",
    "tga",
    "ppm",
    "dng",
    "cr2",
    "mpo",
    "jfif",
]
AROUND = [
    "{}", "{}?", "see {}.", "({})", "[{}]", "<{}>", "{}'s color", "'{}'", '"{}"', "`{}`", "\u201c{}\u201d", "**{}**", "![x]({})",
    "<img src={}>", "{}, {}", "what is {}: a dog?", "{}\u2026", "{}\u3002", "{}の色", "{}?size=2", "{};", "a\n{}\nb", "{}/", "{}#1",
    "{}.What is it", "x={}", "@{}", "{}!!", "~/{}", "./{}", "C:\\{}", "..\\{}", "file:///{}", "https://a.b/{}", "my {}",
]  # fmt: skip


@given(
    st.text(st.characters(categories=("L", "N"), include_characters="_- ()\\ "), min_size=1, max_size=9),
    st.sampled_from(SUFFIXES),
    st.sampled_from(AROUND),
    st.booleans(),
)
def test_a_word_like_an_image_file_is_never_text(stem: str, suffix: str, around: str, windows: bool) -> None:
    """A model would answer about a picture it was not shown."""
    name = f"{stem.strip() or 'a'}x.{suffix}"
    found = find_images(around.replace("{}", name), windows=windows)
    assert found.missing
    assert not found.images


def test_every_format_that_is_there_is_opened_or_named(here: Path) -> None:
    dialogue = Dialogue(Gallery(lambda source: load(source).size))
    (here / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300))
    (here / "icon.ico").write_bytes(b"\0\0\1\0" + bytes(99))
    (here / "a.avif").write_text("<html>404</html>")
    Image.new("RGB", (9, 9)).save(here / "b.jp2", "PNG")  # what counts is what is in the file
    for line, message in (
        ("photo.heic what is it?", "photo.heic: (HEIC, expected one of|a damaged image)"),
        ("what is icon.ico", "icon.ico: an ICO icon, expected one of PNG, JPEG, WebP, GIF, BMP, TIFF"),
        ("is a.avif red?", "a.avif: a web page, expected one of"),
    ):
        with pytest.raises(ImageError, match=message):
            handle(dialogue, line)
    question = handle(dialogue, "is b.jp2 red?").question
    assert question is not None
    assert len(question.turn.pictures) == 1


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

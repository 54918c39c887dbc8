"""A file is there whole under its name, or what was there before still is; what is no file is not waited for."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_checkpoint
from click.testing import CliRunner

from pocketllava import Bundle, BundleError, ConvertError, InputError, ModelNotFound
from pocketllava.chat.dialogue import Dialogue, Gallery
from pocketllava.cli import cli
from pocketllava.convert.pipeline import plan
from pocketllava.errors import PocketLlavaError
from pocketllava.measure.accuracy import file_items
from pocketllava.models.files import atomic_write, open_regular, read_regular, read_text
from pocketllava.models.gguf_header import Header


def test_takes_the_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with atomic_write(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("reason", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_when_writing_fails(tmp_path: Path, reason: BaseException) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as part:
            part.write_text("ne")
            raise reason

    with pytest.raises(type(reason)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_write(path) as one, atomic_write(path) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


FIFOS = hasattr(os, "mkfifo")


def no_files(folder: Path) -> Iterator[Path]:
    """A pipe that nobody writes to, a socket, devices, links to them, and a folder."""
    if FIFOS:
        os.mkfifo(folder / "pipe")
        (folder / "link").symlink_to("pipe")
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(folder / "socket"))
        yield from (folder / "pipe", folder / "link", folder / "socket")
    yield from (p for p in (Path("/dev/zero"), Path("/dev/tty"), Path("/proc/self/fd/0")) if p.exists())
    yield folder


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    for path in no_files(tmp_path):
        with pytest.raises(OSError):
            read_regular(path, 1 << 20)
        with pytest.raises(OSError):
            open_regular(path)


def test_sizes_are_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: a terabyte that takes no disk
    with pytest.raises(OSError, match="found 1099511627776 bytes, expected at most 9"):
        read_regular(path, 9)
    path.write_bytes(b"a\r\nb\rc\n")
    assert read_regular(path, 9) == b"a\r\nb\rc\n"
    assert read_text(path) == "a\nb\nc\n"


CHECKPOINT_FILES = (
    "config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json", "tokenizer.model",
    "model.safetensors", "pytorch_model.bin", "chat_template.jinja", "model.safetensors.index.json", "other.json",
)  # fmt: skip


@pytest.mark.skipif(not FIFOS, reason="no named pipes here")
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("target", ["pipe", "/dev/zero"])
def test_a_checkpoint_of_pipes_and_devices(tmp_path: Path, name: str, target: str) -> None:
    """Whatever stands in a file's place, planning ends at once: refused, or without it where it is of no concern."""
    folder = small_checkpoint.write(tmp_path / "checkpoint", layers=1, ffn=256)
    os.mkfifo(tmp_path / "pipe")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "pipe" if target == "pipe" else target)
    with contextlib.suppress(ConvertError):
        plan(folder)


@pytest.mark.skipif(not FIFOS, reason="no named pipes here")
def test_pipes_in_place_of_everything_else(tmp_path: Path, bundle: Bundle) -> None:
    os.mkfifo(pipe := tmp_path / "pipe.png")
    for name in ("bundle.json", "model.gguf", "mmproj.gguf"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        for path in bundle.folder.iterdir():
            (folder / path.name).symlink_to(pipe if path.name == name else path)
        with pytest.raises((BundleError, ModelNotFound)):
            Bundle.open(folder)
    with pytest.raises(BundleError, match="found a pipe, expected a regular file"):
        Header.read(pipe)
    with pytest.raises(InputError, match="cannot be read"):
        list(file_items(pipe, None))
    dialogue = Dialogue(Gallery(lambda _: (1, 1)))
    for attempt in (dialogue.load, dialogue.save):
        with pytest.raises(InputError, match=r"cannot be (read|written) \(found a pipe"):
            attempt(pipe)
    for command in (["quantize", str(bundle.folder), "--out", str(tmp_path / "q"), "--quant", "IQ2_M", "--imatrix", str(pipe)],
                    ["imatrix", str(bundle.folder), str(pipe), "--out", str(tmp_path / "i")]):  # fmt: skip
        result = CliRunner().invoke(cli, command)
        assert result.exit_code in (1, 2), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit | PocketLlavaError)

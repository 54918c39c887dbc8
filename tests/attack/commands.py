"""Every command on a small model: its arguments, the files that it needs, and where it writes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pictures
import small_checkpoint
from gguf import GGUFReader, GGUFWriter
from gguf import GGUFValueType as V

from pocketllava import Bundle
from pocketllava.convert import convert

# As the installed script. A shell that starts a program with & has it ignore SIGINT, and its children after it.
LAUNCHER = """import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
if gone := os.environ.get("ATTACK_GONE"):  # Python itself cannot start in a folder that is no more
    os.chdir(gone)
    os.rmdir(gone)
from pocketllava.__main__ import main
if "ATTACK_STARTED" in os.environ:
    sys.stderr.write("started\\n")
    sys.stderr.flush()
main()
"""
DEPTH = "clip.vision.feature_layer"


@dataclass(frozen=True)
class Setup:
    """What all commands share: made once."""

    checkpoint: Path
    bundle: Path
    broken: Path
    photo: Path
    pictures: Path
    questions: Path
    home: Path
    launcher: Path


Arguments = Callable[[Setup, Path], list[str]]


def setup(folder: Path) -> Setup:
    """Write the small model and the inputs."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = small_checkpoint.write(folder / "checkpoint", endless=True)
    bundle = convert(checkpoint, folder / "bundle", quant="F16")
    (folder / "pictures").mkdir()
    for n, png in enumerate(pictures.four()):
        (folder / "pictures" / f"{n}.png").write_bytes(png)
    photo = folder / "photo.png"
    shutil.copy(folder / "pictures" / "0.png", photo)
    questions = folder / "questions.jsonl"
    line = '{"image": "photo.png", "question": "Is it red?", "answer": "yes"}\n'
    questions.write_text(line * 1)
    home = folder / "home"
    home.mkdir()
    launcher = folder / "launcher" / "start.py"
    launcher.parent.mkdir()
    launcher.write_text(LAUNCHER)
    broken = _broken(bundle, folder)
    return Setup(checkpoint, bundle.folder, broken, photo, folder / "pictures", questions, home, launcher)


def _broken(bundle: Bundle, folder: Path) -> Path:
    """The bundle's mmproj without its depth, as llama.cpp's first scripts wrote it."""
    path = folder / "broken" / "mmproj.gguf"
    path.parent.mkdir()
    reader, writer = GGUFReader(bundle.mmproj), GGUFWriter(path, "clip")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", DEPTH)):
            item = field.types[-1] if field.types[0] is V.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# In each case's own folder; SHORT is what answers are cut to where they are not to be interrupted.
COMMANDS: dict[str, Arguments] = {
    "ask": lambda s, _: ["ask", str(s.bundle), str(s.photo), "What is it?", "-n", "2"],
    "ask --json": lambda s, _: ["ask", str(s.bundle), str(s.photo), "What is it?", "-n", "2", "--json"],
    "chat": lambda s, _: ["chat", str(s.bundle), str(s.photo), "-n", "2"],
    "convert": lambda s, out: ["convert", str(s.checkpoint), "--out", str(out / "new"), "--quant", "Q8_0"],
    "quantize": lambda s, out: ["quantize", str(s.bundle), "--out", str(out / "new"), "--quant", "Q8_0"],
    "repair": lambda s, out: ["convert", "--repair", str(s.broken), "--out", str(out / "new.gguf")],
    "imatrix": lambda s, out: [
        "imatrix", str(s.bundle), "--images", str(s.pictures), "--limit", "1", "--answer-tokens", "1",
        "--out", str(out / "new.gguf"),
    ],
    "inspect": lambda s, _: ["inspect", str(s.bundle), "--check"],
    "inspect --image": lambda s, _: ["inspect", str(s.bundle), "--image", str(s.photo)],
    "eval": lambda s, out: [
        "eval", str(s.bundle), "--set", str(s.questions), "--results", str(out / "results.jsonl"),
    ],
    "bench": lambda s, _: ["bench", str(s.bundle), "-n", "1", "--tokens", "2"],
    "demo": lambda s, _: ["demo", "--quiet"],
    "--help": lambda s, _: ["--help"],
    "--version": lambda s, _: ["--version"],
}  # fmt: skip


def environment(home: Path) -> dict[str, str]:
    """This process's, with a home of its own."""
    names = ("XDG_CACHE_HOME", "XDG_STATE_HOME", "POCKETLLAVA_CACHE_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1"}


def program(setup: Setup, arguments: list[str]) -> list[str]:
    """The command line that starts a command."""
    return [sys.executable, str(setup.launcher), *arguments]


def hidden(folder: Path) -> list[str]:
    """Unfinished files that a command left in a folder."""
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))

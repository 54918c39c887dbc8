"""Promises that code can break without noticing: names, documented commands, the direction of imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pocketllava
from pocketllava import errors
from pocketllava.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
# Lower rooms may not import higher ones; rooms of one line don't know each other.
LEVELS = [
    {"errors", "whole"},
    {"types"},
    {"backend", "turns", "prefix", "store", "background", "answer_text", "dropped"},
    {"models.layers", "models.rope", "models.siglip"},
    {"models.header", "models.patches", "batch", "tokens", "features", "states", "preparation", "tensors"},
    {"models.config", "models.preprocessing", "models.mmproj_check", "kv"},
    {"models.bundle"},
    {"models", "models.demo"},
    {"convert", "image", "prompt", "vision", "evaluation", "memory", "openai", "shift"},
    {"handler", "names"},
    {"llava", "demo"},
    {"loading", "trace", "sums", "moved", "bench"},
    {"__init__", "show", "imatrix"},
    {"dialogue"},
    {"commands"},
    {"cli"},
]
# Imports inside functions, where a lower room calls a higher one when it runs.
CALLED_LATER = {("llava", "loading"), ("llava", "trace"), ("convert", "__init__")}
PRINTING = ("cli", "commands", "models.demo")  # the trainer has a progress line
FOLDERS = {"convert": "convert", "commands": "runtime/commands", "models.demo": "models/demo"}


def rooms() -> dict[str, list[Path]]:
    """Room -> its files: each file of runtime and models, all of convert, of the commands and of models.demo."""
    found = {room: sorted((ROOT / folder).glob("*.py")) for room, folder in FOLDERS.items()}
    found |= {p.stem: [p] for p in (ROOT / "runtime").glob("*.py")}
    found |= {
        "models" if p.stem == "__init__" else f"models.{p.stem}": [p] for p in (ROOT / "models").glob("*.py")
    }
    return found


def imported(path: Path) -> set[str]:
    """Rooms of pocketllava that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pocketllava":
            below = node.module.split(".")[1:]
            if not below:
                known = {a.name for a in node.names if (ROOT / "runtime" / f"{a.name}.py").exists()}
                names |= known or {"__init__"}
            elif below[0] in ("convert", "commands"):
                names.add(below[0])
            else:
                names.add(".".join(below[:2]))
    return names


def test_imports_go_one_way() -> None:
    level = {room: n for n, group in enumerate(LEVELS) for room in group}
    assert set(rooms()) == set(level)
    for room, files in rooms().items():
        for other in set().union(*map(imported, files)) - {room}:
            assert level[other] < level[room] or (room, other) in CALLED_LATER, f"{room} imports {other}"


def test_only_the_command_line_prints() -> None:
    for room, files in rooms().items():
        for path in files:
            calls = re.findall(r"(?<![\w.])print\(|click\.echo", path.read_text("utf-8"))
            assert not calls or room in PRINTING, path


def test_every_public_name_is_exported_and_documented() -> None:
    assert pocketllava.__all__ == sorted(pocketllava.__all__)
    tree = {
        n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, errors.PocketLlavaError)
    }
    assert tree <= set(pocketllava.__all__)
    assert all(name in (errors.__doc__ or "") for name in tree)
    for name in pocketllava.__all__:
        assert getattr(pocketllava, name).__doc__, name


def test_every_command_is_in_the_readme() -> None:
    for name in cli.commands:
        assert f"pocketllava {name}" in README


def test_the_version_is_told_once() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'version = "{pocketllava.__version__}"' in project
    assert f"## {pocketllava.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize(
    "heavy", ["llama_cpp", "numpy", "PIL", "gguf", "huggingface_hub", "jinja2", "tqdm", "prompt_toolkit"]
)
def test_importing_is_light(heavy: str) -> None:
    code = f"import sys, pocketllava, pocketllava.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_readmes_python_runs(bundle: pocketllava.Bundle) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    photo = str(ROOT / "tests" / "photo.jpg")
    for block in blocks:
        code = block.replace('"llava-1.5-7b"', repr(str(bundle.folder))).replace('"photo.jpg"', repr(photo))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout

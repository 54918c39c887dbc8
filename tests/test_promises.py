"""Promises that code can break without noticing: names, documented commands, the direction of imports."""

from __future__ import annotations

import importlib.metadata
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
PRINTING = ("runtime/cli.py", "runtime/commands", "models/demo/training")  # the trainer has a progress line


def sources() -> list[str]:
    """The package's files, relative to the checkout."""
    return [
        path.relative_to(ROOT).as_posix()
        for folder in ("runtime", "convert", "models")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def test_every_room_is_packaged() -> None:
    """A folder that pyproject.toml forgets is missing from the wheel; training is not meant to be in it."""
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    mapped = set(re.findall(r'^"pocketllava[\w.]*" = "([\w/]+)"$', project, re.MULTILINE))
    assert mapped == {str(Path(path).parent) for path in sources()} - {"models/demo/training"}


def test_only_the_command_line_prints() -> None:
    for path in sources():
        calls = re.findall(r"(?<![\w.])print\(|click\.echo", (ROOT / path).read_text("utf-8"))
        assert not calls or path.startswith(PRINTING), path


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
    assert importlib.metadata.version("pocketllava") == pocketllava.__version__
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

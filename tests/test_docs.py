"""README and docs are true: Python runs, commands parse and print what is shown, --help is as written, paths exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import pocketllava
from pocketllava import Bundle
from pocketllava.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = ("pocketllava", "make", "pip")
FIRST_SCREEN = 15  # lines
FOLDERS = ("runtime", "convert", "models", "tests", "examples", "benchmarks", "docs")


def blocks(language: str) -> list[Any]:
    """Fenced blocks of that language in all pages, each named by its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            found.append(pytest.param(match[1], id=f"{page.relative_to(ROOT).as_posix()}:{line}"))
    return found


def sessions(block: str) -> Iterator[tuple[str, list[str]]]:
    """(command, the lines it is shown to print) of a console block."""
    command: str | None = None
    shown: list[str] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            if command is not None:
                yield command, shown
            command, shown = line[2:], []
        else:
            shown.append(line)
    assert command is not None, block
    yield command, shown


def words(command: str) -> list[list[str]]:
    """The words of each program in a pipe, without variables set in front."""
    programs: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word == "|":
            programs.append([])
        elif programs[-1] or not re.match(r"^[A-Z_]+=", word):
            programs[-1].append(word)
    return programs


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(
    block: str,
    bundle: Bundle,
    make_checkpoint: Callable[..., Path],
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a program of its own would, in the folder `here`, and prints something."""
    names = {
        "llava-1.5-7b": bundle.folder,
        "photo.jpg": ROOT / "tests" / "photo.jpg",
        "llava-hf/llava-1.5-7b-hf": make_checkpoint(),
    }
    for name, path in names.items():
        block = block.replace(f'"{name}"', repr(str(path)))
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("block", blocks("console"))
def test_commands_are_commands(block: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for command, _ in sessions(block):
        for program, *arguments in words(command):
            if program == "pocketllava":
                parse(arguments)
            elif program == "make":
                assert set(arguments) <= targets, command
            else:
                assert program in (*PROGRAMS, "printf"), command


def parse(arguments: list[str]) -> None:
    """As the command line does, without running it; raises click's usage errors."""
    name, *rest = arguments
    group = click.Context(cli, **cli.context_settings)
    command = cli.get_command(group, name)
    assert command is not None, name
    command.make_context(name, rest, parent=group)


@pytest.mark.parametrize("block", blocks("console"))
def test_commands_print_what_is_shown(block: str, here: Path) -> None:
    """Of commands about the demo model, the only one that is here; `...` stands for any lines."""
    for name, copy in (("examples/scene.png", shutil.copy), ("models/demo/checkpoint", shutil.copytree)):
        if name in block:
            (here / name).parent.mkdir(parents=True)
            copy(ROOT / name, here / name)
    for command, shown in sessions(block):
        if not shown or "demo" not in command:
            assert not shown or "llava-1.5-7b" in command, f"{command}: nobody checks what it prints"
            continue
        first, *others = words(command)
        typed = first[1].encode().decode("unicode_escape") if first[0] == "printf" else None
        (arguments,) = others or [first]
        result = CliRunner().invoke(cli, arguments[1:], input=typed, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        pattern = ".*".join(re.escape(part) for part in "\n".join(shown).split("..."))
        assert re.fullmatch(pattern, result.stdout.rstrip("\n"), re.DOTALL), result.stdout


def test_help_is_as_written() -> None:
    """docs/commands.md against the real --help, whatever a version of click does about spaces."""
    spec = importlib.util.spec_from_file_location("commands_page", ROOT / "docs" / "commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "commands.md").read_text("utf-8")
    assert written.split() == module.page().split(), "run `python docs/commands.py`"
    assert set(re.findall(r"^## (\w+)$", written, re.MULTILINE)) == set(cli.commands)


def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text("utf-8")
    for name in set(pocketllava.__all__) - {"__version__"}:
        is_error = issubclass(getattr(pocketllava, name), pocketllava.PocketLlavaError)
        assert is_error or f"::: pocketllava.{name}\n" in reference, name


def test_every_report_names_tests_that_are_there() -> None:
    rows = re.findall(r"^\| \[(\S+)#(\d+)\]\(https://github\.com/(\S+)/(?:issues|pull)/(\d+)\): .+ \| (.+) \|$",
                      (ROOT / "docs" / "reports.md").read_text("utf-8"), re.MULTILINE)  # fmt: skip
    assert len({row[:2] for row in rows}) == len(rows) >= 40
    for repository, number, linked, linked_number, tests in rows:
        assert (repository, number) == (linked, linked_number)
        names = re.findall(r"`(\w+\.py)::(\w+)`", tests)
        assert names, (repository, number)
        for file, function in names:
            tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
            assert function in {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}, (file, function)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    """Links to files, and every path in backquotes that begins with one of our folders."""
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path


def test_the_map_shows_every_room() -> None:
    """CONTRIBUTING's map names every folder of the package and no file that is gone."""
    drawn = re.search(
        r"^```text\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert drawn is not None
    room, names = ROOT, set()
    for line in drawn[1].splitlines():
        parts = [part.strip() for part in re.split(r" {2,}", line.strip())[0].split(",")]
        if not line.startswith(" "):
            room = ROOT / parts[0]
            assert room.is_dir(), line
            continue
        for part in re.findall(r"[\w]+(?:\.py|/)", ", ".join(parts)):
            assert (room / part).exists(), line
            names.add((room / part).relative_to(ROOT).as_posix())
    rooms = {
        p.parent.relative_to(ROOT).as_posix()
        for top in ("runtime", "convert", "models")
        for p in (ROOT / top).glob("*/__init__.py")
    }
    assert rooms <= names


def test_questions_are_answered_by_files_that_are_there() -> None:
    rows = re.findall(r"^\| (.+\?) \| (.+) \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    for question, answer in rows:
        files = re.findall(r"`([\w/]+\.py)`", answer)
        assert files, question
        for file in files:
            assert ast.get_docstring(ast.parse((ROOT / file).read_text("utf-8"))), file


def test_the_readme_begins_with_commands() -> None:
    """One sentence, then install and three commands with what they print, before the first screen ends."""
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert lines[0].endswith(".")
    assert lines[1:3] == ["", "```console"]
    first = lines[3:FIRST_SCREEN]
    assert [line.split()[1] for line in first if line.startswith("$ ")] == ["pip", *["pocketllava"] * 3]
    assert first[1] == "$ pocketllava demo"  # without a network
    assert "```" in first

"""Promises that code can break without noticing: packaged rooms, printing, public names, light imports."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pocketllava
from pocketllava import errors

ROOT = Path(__file__).parent.parent
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


def test_the_version_is_told_once() -> None:
    assert importlib.metadata.version("pocketllava") == pocketllava.__version__
    assert f"## {pocketllava.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.parametrize(
    "heavy",
    [
        "llama_cpp",
        "llguidance",
        "numpy",
        "PIL",
        "gguf",
        "huggingface_hub",
        "jinja2",
        "tqdm",
        "prompt_toolkit",
        "asyncio",
    ],
)
def test_importing_is_light(heavy: str) -> None:
    code = f"import sys, pocketllava, pocketllava.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


EXTRAS = {
    "click": "cli",
    "prompt_toolkit": "cli",
    "tqdm": "cli",
    "huggingface_hub": "convert",
    "requests": "convert",
    "llguidance": "structured",
    "pyarrow": "parquet",
    "pillow-heif": "heic",
    "llm": "clients",
    "pydantic": "clients",
    **dict.fromkeys(("starlette", "uvicorn", "msgspec", "prometheus-client", "h11"), "serve"),
}
COMMAND_LINE = ("runtime/cli.py", "runtime/__main__.py", "runtime/commands/", "runtime/chat/")
DISTRIBUTIONS = {
    "PIL": "pillow",
    "llama_cpp": "llama-cpp-python",
    "pillow_heif": "pillow-heif",
    "prometheus_client": "prometheus-client",
}


def third_party_imports(path: str) -> set[str]:
    """Packages that a file imports anywhere, by their distributions' names."""
    tree = ast.walk(ast.parse((ROOT / path).read_text("utf-8")))
    names = {a.name for node in tree if isinstance(node, ast.Import) for a in node.names}
    tree = ast.walk(ast.parse((ROOT / path).read_text("utf-8")))
    names |= {str(node.module) for node in tree if isinstance(node, ast.ImportFrom)}
    first = {name.split(".")[0] for name in names} - {"pocketllava", *sys.stdlib_module_names}
    return {DISTRIBUTIONS.get(name, name) for name in first}


def test_dependencies_are_what_their_room_needs() -> None:
    """Asking needs the core alone; the command line's packages and the hub's stay in their rooms."""
    required = importlib.metadata.requires("pocketllava") or []
    core = {re.split(r"[<>=]", name)[0] for name in required if "extra ==" not in name}
    extras = set()
    for path in sources():
        if path.startswith("models/demo/training"):
            continue
        used = third_party_imports(path)
        extras |= used - core
        assert not used & {"click", "prompt_toolkit", "tqdm"} or path.startswith(COMMAND_LINE), path
        assert "huggingface_hub" not in used or path.startswith(
            ("convert/", "runtime/download/", "runtime/commands/convert.py")
        ), path
    assert extras == set(EXTRAS)
    for name, extra in EXTRAS.items():
        assert any(re.match(rf"{name}\b.*extra == .{extra}\W", line) for line in required), name


CORE_ALONE = """
import sys
sys.modules |= dict.fromkeys(["click", "prompt_toolkit", "tqdm.std", "huggingface_hub"])
from pocketllava import Llava
with Llava.load("demo") as llava:
    print(llava.ask(None, "Hello?", options=None))
import pocketllava.__main__
pocketllava.__main__.main()
"""


def test_asking_works_without_the_extras_and_the_command_line_says_what_it_needs() -> None:
    done = subprocess.run([sys.executable, "-c", CORE_ALONE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    expected = 'error: the command line needs click; install it with pip install "pocketllava[cli]"\n'
    assert done.stderr == expected


def private_names(path: Path) -> set[str]:
    """Private attributes of others that a file touches, and private names that it imports from others."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                names.add(f"{ast.unparse(owner)}.{node.attr}")
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name)}
    return names


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_ctypes_and_llama_cpps_own_names_stay_in_one_room() -> None:
    for path in sources():
        if path.startswith("runtime/llamacpp/"):
            continue
        text = (ROOT / path).read_text("utf-8")
        assert not re.search(r"^\s*(import|from) ctypes\b", text, re.MULTILINE), path
        foreign = {name for name in private_names(ROOT / path) if not own_class(name, text)}
        assert foreign <= {"os._exit"}, path  # public in spite of its name


def own_class(name: str, text: str) -> bool:
    """Whether a private attribute is defined in the same file: an object may know others of its class."""
    attribute = name.rsplit(".", 1)[1]
    return bool(re.search(rf"def {attribute}\(|self\.{attribute}\b|^    {attribute}\b", text, re.MULTILINE))


FOREIGN = (
    "._fields_",
    "._name",
    "._didModify",
)  # of ctypes' structures and libraries, and of zipfile's archives


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_no_test_or_benchmark_touches_what_is_private(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text("utf-8")
        names = {name for name in private_names(path) if not own_class(name, text)}
        assert not {name for name in names if not name.endswith(FOREIGN)}, path

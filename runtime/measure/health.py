"""What is installed, what this machine offers, and whether answers are right here: for `pocketllava doctor`.

Whatever cannot be told becomes a text that says why; nothing here raises. Knows versions, folders and children; prints
nothing.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pocketllava.llamacpp.children import run_child
from pocketllava.measure.self_test import ANSWERS, LIBRARY, recorded
from pocketllava.models.files import cache_folder, expanded
from pocketllava.models.store import Store
from pocketllava.settings import settings
from pocketllava.types import LoadOptions

T = TypeVar("T")
DISTRIBUTIONS = ("pocketllava", "llama-cpp-python", "gguf", "numpy", "pillow")
NOT_FOR_USERS = ("dev", "docs", "page", "reference", "train")
TIMEOUT_S = 120.0
MAX_FILES = 100_000  # of a folder that is counted


@dataclass(frozen=True)
class Folder:
    """A folder that this package writes to: what for, where, and its bytes; None where there is none."""

    purpose: str
    path: str
    n_bytes: int | None


@dataclass(frozen=True)
class SelfTest:
    """The demo's answers beside the recorded ones. failure: why there are none, or which differ; "" if all is well."""

    n_equal: int
    n_questions: int
    devices: tuple[str, ...] = ()
    seconds: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class Health:
    """Everything. library: what measure/self_test.py found, or why not; extras: whether each is complete."""

    versions: dict[str, str]
    library: dict[str, Any]
    library_failure: str
    folders: tuple[Folder, ...]
    extras: dict[str, bool]
    self_test: SelfTest = field(repr=False)

    @property
    def is_well(self) -> bool:
        """Whether answers are as recorded."""
        return not self.self_test.failure


def health() -> Health:
    """Look at all of it, in children where llama.cpp is involved; about ten seconds."""
    library, failure = _child(LIBRARY)
    return Health(
        versions=versions(),
        library=library or {},
        library_failure=failure,
        folders=_or(folders, ()),
        extras=_or(extras, {}),
        self_test=self_test(),
    )


def versions() -> dict[str, str]:
    """Of distributions, Python and the system."""
    found = {name: _version(name) or "missing" for name in DISTRIBUTIONS}
    return {**found, "Python": sys.version.split()[0], "system": platform.platform()}


def extras() -> dict[str, bool]:
    """Extra -> whether every distribution that it names is installed."""
    complete: dict[str, bool] = {}
    for requirement in metadata.requires("pocketllava") or ():
        extra, name = re.search(r"extra == ['\"]([\w-]+)", requirement), re.match(r"[\w.-]+", requirement)
        if extra and name and extra[1] not in NOT_FOR_USERS and name[0] != "pocketllava":
            complete[extra[1]] = complete.get(extra[1], True) and _version(name[0]) is not None
    return complete


def folders() -> tuple[Folder, ...]:
    """Caches of this user."""
    found = [Folder("cache", *_place(cache_folder)), Folder("models", *_place(lambda: Store.default().root))]
    variable = settings(LoadOptions)["cache_dir"].variable
    if variable and (named := os.environ.get(variable)):
        found.append(Folder(f"images, {variable}", *_place(lambda: expanded(named))))
    return tuple(found)


def self_test() -> SelfTest:
    """Ask the demo in a child, and compare."""
    nothing: dict[str, str] = {}
    expected = _or(recorded, nothing)
    answer, failure = _child(ANSWERS)
    if answer is None or not expected:
        return SelfTest(0, len(expected), failure=failure or "models/demo/answers.json is missing; reinstall")
    given = answer["answers"]
    wrong = [q for q, text in expected.items() if given.get(q) != text]
    first = f"{wrong[0]!r}: found {given.get(wrong[0])!r}, expected {expected[wrong[0]]!r}" if wrong else ""
    devices = tuple(map(str, answer["devices"]))
    return SelfTest(len(expected) - len(wrong), len(expected), devices, float(answer["seconds"]), first)


def _child(function: str) -> tuple[dict[str, Any] | None, str]:
    """(answer, "") or (None, the reason)."""
    try:
        result = run_child(function, timeout_s=TIMEOUT_S)
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return (None, result.reason) if result.exit_code or result.answer is None else (result.answer, "")


def _place(folder: Callable[[], Path]) -> tuple[str, int | None]:
    """(path, bytes of its files), or (why there is none, None)."""
    try:
        path = folder()
        return str(path), _size(path) if path.is_dir() else None
    except Exception as error:
        return str(error), None


def _size(folder: Path) -> int:
    """Bytes of a folder's files, of the first ones where there are very many; links are not followed."""
    total = n_files = 0
    for root, _, names in os.walk(folder):
        for name in names:
            n_files += 1
            with suppress(OSError):  # it may be gone by now
                total += Path(root, name).lstat().st_size
        if n_files > MAX_FILES:
            break
    return total


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _or(function: Callable[[], T], otherwise: T) -> T:
    """What the function gives, or something else where it fails: a doctor does not fall ill."""
    try:
        return function()
    except Exception:
        return otherwise

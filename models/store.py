"""The store: one folder with a folder per model, named `base` or `base:tag`, and who makes, uses or removes which.

Knows names, folders, locks and renames; not what is in a bundle, nor where it comes from. Listing it reads file names
only. An entry appears whole, by a rename from `.staging`; what killed processes left there is removed by the next one
that changes the store. A lease is a locked file per process that has a model loaded.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_data_path

from pocketllava.errors import InputError, ModelNotFound, StateError
from pocketllava.models.files import expanded, move
from pocketllava.models.manifest import MANIFEST
from pocketllava.settings import nearest

if TYPE_CHECKING:
    from filelock import BaseFileLock

logger = logging.getLogger("pocketllava")
VARIABLE = "POCKETLLAVA_HOME"
STAGING, LEASES, DOWNLOADS, GATE = ".staging", ".leases", ".downloads", ".lock"
GATE_S = 30.0  # nobody holds the gate for longer than a rename takes
POLL_S = 0.2
SEPARATOR = "@"  # of base and tag on disk, where Windows has no colons
USUAL_TAG = "q4_k_m"  # before f16, which few laptops hold
OWN = "="  # in file names of the store's own, which no model's name has
LOCK = f"{OWN}lock"
MAX_BASE, MAX_TAG = 100, 60  # characters
GRAMMAR = (
    "two or more letters, digits and . _ - (at its ends letters or digits), and after a colon a tag of the same"
    " kind, such as llava-1.5-7b:q4_k_m"
)
_PART = r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?"
_NAME = re.compile(rf"(?=..)(?!.:)({_PART})(?::({_PART}))?")  # c:q8_0 is a drive's file on Windows
# Windows opens these devices whatever follows a dot; demo is the model in the package.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
DEMO = "demo"


def parsed(name: str) -> str:
    """A name in its one spelling, lower case. Raises InputError for what cannot be one."""
    match = _NAME.fullmatch(name.lower()) if name.isascii() else None
    if match is None or len(match[1]) > MAX_BASE or len(match[2] or "") > MAX_TAG:
        raise InputError(f"{name!r}: not a model's name, expected {GRAMMAR}")
    if match[1] == DEMO or _DEVICE.fullmatch(match[1]):
        whose = "the model in the package" if match[1] == DEMO else "a device on Windows"
        raise InputError(f"{name!r}: the name of {whose}; choose another")
    return match[0]


def is_name(name: str) -> bool:
    """Whether a text can be a model's name."""
    try:
        return bool(parsed(name))
    except InputError:
        return False


@dataclass(frozen=True)
class Store:
    """Models by name, below one folder, which need not exist yet."""

    root: Path

    @classmethod
    def default(cls) -> Store:
        """POCKETLLAVA_HOME, or this user's data folder on this platform. Raises InputError where there is none."""
        own = os.environ.get(VARIABLE)
        root = expanded(own) if own else Path(user_data_path("pocketllava", appauthor=False))
        if root.parts[:1] == ("~",):
            raise InputError(f"{root}: cannot be the store, this user has no home folder; set {VARIABLE}")
        return cls(root.absolute())

    def names(self) -> list[str]:
        """Every model's name, sorted; file names only. Raises InputError for a store that cannot be read."""
        try:
            with os.scandir(self.root) as entries:
                folders = [e.name for e in entries if not e.name.startswith(".") and e.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"{self.root}: the store cannot be read ({error.strerror or error})") from error
        names = (name.replace(SEPARATOR, ":", 1) for name in folders)
        return sorted(n for n in names if n == _or_none(n) and (self._place(n) / MANIFEST).is_file())

    def folder(self, name: str) -> Path:
        """A model's folder, or where it would be. Raises InputError for what cannot be a name.

        A name without a tag stands for the model of just that name, else for q4_k_m, else for the first of its tags.
        """
        return self._place(self._full(parsed(name)))

    def has(self, name: str) -> bool:
        """Whether there is a model that folder() means."""
        return (self.folder(name) / MANIFEST).is_file()

    def find(self, name: str) -> str:
        """The full name of a model. Raises InputError, ModelNotFound."""
        full = self._full(parsed(name))
        if not (self._place(full) / MANIFEST).is_file():
            raise ModelNotFound(
                f"{name}: no such model in the store; `pocketllava list` shows them, `pocketllava pull` adds one"
                f"{self.nearest(name)}"
            )
        return full

    def nearest(self, name: str) -> str:
        """The name that is meant by a mistyped one, as the end of a message; or nothing."""
        names = self.names()
        bases = {n.partition(":")[0] for n in names}
        return nearest(name, names) or nearest(name, bases)

    def name_of(self, folder: Path) -> str | None:
        """The name of the model whose folder this is; None for a folder elsewhere."""
        name = folder.name.replace(SEPARATOR, ":", 1)
        try:
            inside = folder.absolute().parent == self.root or folder.resolve().parent == self.root.resolve()
        except (OSError, RuntimeError):
            inside = False
        return name if inside and _or_none(name) == name else None

    @contextmanager
    def create(self, name: str, *, wait: bool = False) -> Iterator[Path]:
        """A staging folder, which becomes the model when the block ends without an exception.

        wait: for another process that makes the same one; it may then be there. Raises InputError for a name that is
        taken and for a store that cannot be written, StateError for one that another process is making.
        """
        name = parsed(name)
        staging = self.root / STAGING / self._place(name).name
        with self._changing():
            lock = self._staging_lock(name, staging, wait)
        try:
            with self._changing():
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
            yield staging
            with self._changing(), self._gate():
                self._check_free(name)
                move(staging, self._place(name))
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            with self._gate():
                _give_back(lock)

    def remove(self, name: str) -> None:
        """Remove a model. Raises ModelNotFound, StateError for one that is loaded somewhere, InputError."""
        with self._changing(), self._gate():
            full = self.find(name)
            place = self._place(full)
            if self._leased(place.name):
                raise StateError(f"{full}: is loaded by another process or model; close it first")
            trash = self.root / STAGING / f"{place.name}{OWN}{secrets.token_hex(4)}"
            trash.parent.mkdir(exist_ok=True)
            move(place, trash)
        _delete(trash)

    @contextmanager
    def lease(self, name: str) -> Iterator[None]:
        """Marks a model as loaded while the block runs, so that no process removes it. Raises ModelNotFound.

        In a store that cannot be written, where nothing can be removed either, it does nothing.
        """
        full, lock = self.find(name), None
        with suppress(OSError, NotImplementedError):
            lock = self._new_lease(full)
        try:
            yield
        finally:
            if lock is not None:
                _give_back(lock)

    def lease_of(self, folder: Path) -> AbstractContextManager[None]:
        """As lease, by a model's folder; nothing for a folder that is not in the store."""
        name = self.name_of(folder)
        return nullcontext() if name is None else self.lease(name)

    def _place(self, name: str) -> Path:
        return self.root / name.replace(":", SEPARATOR)

    def _full(self, name: str) -> str:
        """A parsed name with the tag that it stands for."""
        if ":" in name or (self._place(name) / MANIFEST).is_file():
            return name
        tagged = [n for n in self.names() if n.startswith(f"{name}:")]
        usual = f"{name}:{USUAL_TAG}"
        return usual if usual in tagged else next(iter(tagged), name)

    def _check_free(self, name: str) -> None:
        place = self._place(name)
        if place.exists() or place.is_symlink():
            raise InputError(
                f"{name}: there is a model of that name; remove it with `pocketllava rm {name}`, or choose another"
            )

    def _staging_lock(self, name: str, staging: Path, wait: bool) -> BaseFileLock:
        waiting = False
        while True:
            with self._gate():
                self._check_free(name)
                self._sweep()
                lock = _taken(staging.with_name(staging.name + LOCK))
            if lock is not None:
                return lock
            if not wait:
                raise StateError(f"{name}: another process is making it; wait for it, or choose another name")
            if not waiting:
                logger.warning("%s: another process is making it; waiting for it", name)
            waiting = True
            time.sleep(POLL_S)

    def _sweep(self) -> None:
        """Remove what killed processes left; the caller holds the gate."""
        staging = self.root / STAGING
        staging.mkdir(exist_ok=True)
        for path in staging.iterdir():
            if not path.name.endswith(LOCK) and (lock := _taken(path.with_name(path.name + LOCK))):
                _delete(path)
                _give_back(lock)

    def _leased(self, entry: str) -> bool:
        """Whether a living process has the model loaded; the caller holds the gate."""
        for path in (self.root / LEASES).glob(f"{entry}{OWN}*"):
            lock = _taken(path)
            if lock is None:
                return True
            _give_back(lock)
        return False

    def _new_lease(self, name: str) -> BaseFileLock:
        with self._gate():
            self.find(name)
            folder = self.root / LEASES
            folder.mkdir(exist_ok=True)
            entry = f"{self._place(name).name}{OWN}{os.getpid()}-{secrets.token_hex(4)}"
            lock = _taken(folder / entry)
        if lock is None:
            raise OSError(errno.EAGAIN, "a new file is locked", str(folder / entry))
        return lock

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.root}: the store cannot be changed ({error.strerror or error}); close what has its files"
                f" open, or set {VARIABLE} to a folder that can be written"
            ) from error

    @contextmanager
    def _gate(self) -> Iterator[None]:
        """One process at a time, for as long as a rename takes. Raises StateError, OSError."""
        from filelock import FileLock, Timeout

        self.root.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.root / GATE, timeout=GATE_S):
                yield
        except Timeout:
            raise StateError(f"{self.root}: another process holds the store's lock; try again") from None


def _or_none(name: str) -> str | None:
    return parsed(name) if is_name(name) else None


def _taken(path: Path) -> BaseFileLock | None:
    """The lock file's lock, or None where another has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def _give_back(lock: BaseFileLock) -> None:
    """Release a lock and remove its file, which nobody takes without the gate."""
    lock.release()
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)


def _delete(path: Path) -> None:
    """Remove a folder, or a link to one but not what it points to."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)

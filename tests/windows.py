"""Windows' rules about files, on Linux: what is open or mapped anywhere can be neither removed, renamed nor replaced.

Python's own functions enforce them here; what they call, and what calls them, is real.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

NAMES = ("unlink", "remove", "rename", "replace", "rmdir")


def in_use() -> set[str]:
    """Real paths of the files that this process or a child of it has open or mapped, and of current folders."""
    return set(_of(os.getpid()))


def _of(pid: int) -> Iterator[str]:
    with suppress(OSError):  # it may have ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text("ascii").split():
                yield from _of(int(child))
    with suppress(OSError):
        proc = Path(f"/proc/{pid}")
        yield os.readlink(proc / "cwd")  # noqa: PTH115
        for descriptor in (proc / "fd").iterdir():
            with suppress(OSError):
                path = os.readlink(descriptor)  # noqa: PTH115
                if not os.path.isdir(path):  # noqa: PTH112
                    yield path
        for line in (proc / "maps").read_text("utf-8", "replace").splitlines():
            yield from line.split(maxsplit=5)[5:]


def _real(path: Any, folder: int | None) -> str:
    """Without links in its folders; a link itself stays one."""
    text = os.fsdecode(path)
    if folder is not None:
        text = f"/proc/self/fd/{folder}/{text}"
    head, tail = os.path.split(text.rstrip("/"))
    return os.path.join(os.path.realpath(head or "."), tail)  # noqa: PTH118


def _check(path: str) -> None:
    if any(used == path or used.startswith(path + "/") for used in in_use()):
        raise PermissionError(errno.EACCES, "The process cannot access the file: it is being used", path)


@contextmanager
def windows_files() -> Iterator[None]:
    """Inside the block, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setattr(os, name, _ruled(name, getattr(os, name)))
        yield


def _ruled(name: str, real: Callable[..., None]) -> Callable[..., None]:
    def removed(path: Any, *, dir_fd: int | None = None) -> None:
        _check(_real(path, dir_fd))
        real(path, dir_fd=dir_fd)

    def renamed(old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        source, target = _real(old, src_dir_fd), _real(new, dst_dir_fd)
        if os.path.lexists(source):
            _check(source)
        if os.path.lexists(target) and source != target:
            if name == "rename" or os.path.isdir(target):  # noqa: PTH112
                kind = FileExistsError if name == "rename" else PermissionError
                raise kind(errno.EEXIST if name == "rename" else errno.EACCES, "it is there already", target)
            _check(target)
        real(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    return renamed if name in ("rename", "replace") else removed

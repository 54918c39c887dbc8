"""One file's bytes from a hub: resumed across runs, checked by hash, then given its name.

Knows a folder of files named by their hash, `KEY` whole and `KEY.part` not, each with a lock; no repository. A part
is continued with Range, and with If-Range where the server named what it sent before.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketllava.download.hub import Hub, HubFile, TryAgain
from pocketllava.errors import DiskFull, DownloadError
from pocketllava.models.files import move
from pocketllava.models.store import DOWNLOADS, Store

if TYPE_CHECKING:
    import requests

logger = logging.getLogger("pocketllava")
BLOCK_BYTES = 1 << 14  # as much is lost where a connection breaks: urllib3 hands out whole blocks only
HASHED_BYTES = 1 << 20
MAX_WRONG = 2  # downloads of a whole file with wrong bytes
POLL_S = 0.2
PART, ETAG, LOCK = ".part", ".etag", ".lock"
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Downloads:
    """Files of a hub in a folder."""

    folder: Path
    hub: Hub

    def get(self, file: HubFile, url: str, progress: Progress) -> Path:
        """The file's path in the folder, whole; another process that downloads it is waited for.

        progress: is told how many of its bytes are there. Raises DownloadError, ModelNotFound, DiskFull.
        """
        whole, part = self.folder / file.key, self.folder / f"{file.key}{PART}"
        with self._locked(file):
            if size_of(whole) != file.bytes:
                try:
                    self._fill(part, file, url, progress)
                    move(part, whole)
                except OSError as error:
                    raise _full_or(error, file, part) from error
            progress(file.bytes)
            return whole

    def missing_bytes(self, files: Iterable[HubFile]) -> int:
        """Bytes that are still to be downloaded."""
        names = [(file, self.folder / file.key) for file in files]
        return sum(
            max(0, file.bytes - size_of(path.with_name(path.name + PART)))
            for file, path in names
            if size_of(path) != file.bytes
        )

    def discard(self, files: Iterable[HubFile]) -> None:
        """Remove files that have found their place."""
        for file in files:
            for suffix in ("", PART, ETAG, LOCK):
                with suppress(OSError):  # Windows: another process has it open
                    (self.folder / f"{file.key}{suffix}").unlink(missing_ok=True)

    @contextmanager
    def _locked(self, file: HubFile) -> Iterator[None]:
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{file.key}{LOCK}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("%s: another process downloads it; waiting for it", file.name)
            lock.acquire(poll_interval=POLL_S)
        try:
            yield
        finally:
            lock.release()

    def _fill(self, part: Path, file: HubFile, url: str, progress: Progress) -> None:
        """Ask until the part is whole and its hash right. Raises DownloadError, ModelNotFound, OSError."""
        failures = wrong = 0
        patience, most = self.hub.patience, size_of(part)
        while True:
            try:
                self._append(part, file, url, progress)
                if is_right(part, file):
                    return
                wrong, reason, wait_s = wrong + 1, "its bytes have another hash than the hub names", 0.0
                part.unlink()
            except TryAgain as error:
                reason, wait_s = str(error), error.wait_s
            failures = 1 if size_of(part) > most else failures + 1
            most = max(most, size_of(part))
            if failures >= patience.tries or wrong >= MAX_WRONG:
                raise DownloadError(
                    f"{file.name}: not whole, {size_of(part)} of {file.bytes} bytes are here ({reason}); the same"
                    " command goes on from there"
                )
            patience.wait(failures, wait_s)

    def _append(self, part: Path, file: HubFile, url: str, progress: Progress) -> None:
        """One request for what the part lacks. Raises TryAgain, OSError."""
        start = size_of(part)
        if start >= file.bytes > 0:
            return
        etag = part.with_name(part.name.removesuffix(PART) + ETAG)
        with self.hub.get(url, file.name, _range(start, etag)) as response:
            offset = self._offset(response, start, part, file)
            _note(response, etag)
            with part.open("r+b" if offset else "wb") as target:
                if offset:
                    target.seek(offset)
                    target.truncate()
                for block in response.iter_content(BLOCK_BYTES):
                    offset += len(block)
                    if offset > file.bytes:
                        raise TryAgain(f"the server sent more than {file.bytes} bytes")
                    target.write(block)
                    progress(offset)
                target.flush()
                os.fsync(target.fileno())  # a rename can reach the disk before the data does
        if offset < file.bytes:
            raise TryAgain("the connection broke")

    def _offset(self, response: requests.Response, start: int, part: Path, file: HubFile) -> int:
        """Where the answer's bytes belong: after the part's, or at the start. Raises TryAgain."""
        place = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        length = response.headers.get("Content-Length", "")
        if response.status_code == 416 or (
            response.status_code == 206 and (not place or int(place[1]) != start)
        ):
            part.unlink(missing_ok=True)
            raise TryAgain("the server has another range than was asked for")
        offset = start if response.status_code == 206 else 0
        if length.isdecimal() and offset + int(length) != file.bytes:
            raise TryAgain(f"the server has {offset + int(length)} bytes, the hub names {file.bytes}")
        return offset


def clear(store: Store) -> None:
    """Remove what stopped downloads left; what a living process writes stays."""
    from filelock import FileLock, Timeout

    for lock in (store.root / DOWNLOADS).glob(f"*{LOCK}"):
        with suppress(Timeout, OSError), FileLock(lock, timeout=0):
            for suffix in ("", PART, ETAG):
                lock.with_name(lock.name.removesuffix(LOCK) + suffix).unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """A file's size; 0 for none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def is_right(path: Path, file: HubFile) -> bool:
    """Whether a file has the size and the hash that the hub names."""
    if size_of(path) != file.bytes:
        return False
    digest: Any = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.bytes}\0".encode())
    with path.open("rb") as content:
        while block := content.read(HASHED_BYTES):
            digest.update(block)
    return bool(digest.hexdigest() == (file.sha256 or file.sha1))


def _range(start: int, etag: Path) -> dict[str, str]:
    if not start:
        return {}
    headers = {"Range": f"bytes={start}-"}
    with suppress(OSError, ValueError):
        if known := etag.read_text("ascii"):
            headers["If-Range"] = known
    return headers


def _note(response: requests.Response, path: Path) -> None:
    """Keep a strong ETag for If-Range, which takes no weak one."""
    etag = response.headers.get("ETag", "")
    if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag):
        path.write_text(etag, "ascii")
    else:
        path.unlink(missing_ok=True)


def _full_or(error: OSError, file: HubFile, part: Path) -> Exception:
    if error.errno == errno.ENOSPC:
        lacking = file.bytes - size_of(part)
        return DiskFull(
            f"{file.name}: the disk is full, {lacking} more bytes are needed in {part.parent}; make room, and give the"
            " same command again",
            lacking,
            0,
        )
    return DownloadError(f"{error.filename or part}: cannot be written ({error.strerror or error})")

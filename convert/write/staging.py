"""The staging folder: a bundle is made in a hidden folder beside the final one, then renamed into place.

Knows folders, locks and renames; nothing of the files' content.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pocketllava.convert.write.journal import JOURNAL
from pocketllava.errors import ConvertError
from pocketllava.models.bundle import MANIFEST, MMPROJ, MODEL

LOCK = "lock"


def check_target(target: Path, force: bool) -> None:
    """Refuse a file, a folder with other files in it, and, without `force`, an existing bundle."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConvertError(f"{target}: a file; --out names the folder to make")
    names = {path.name for path in target.iterdir()}
    if foreign := sorted(names - {MODEL, MMPROJ, MANIFEST}):
        raise ConvertError(
            f"{target}: holds {foreign[0]!r}; --out must be a new or empty folder, or a bundle"
        )
    if names and not force:
        raise ConvertError(f"{target}: holds a bundle already; use --force to replace it, or another --out")


@contextmanager
def working_folder(target: Path, resume: bool) -> Iterator[Path]:
    """A folder beside the target, for one conversion at a time; removed when the block ends.

    A killed run leaves it behind; the next run to the same target empties it, unless `resume`. A resumable run also
    keeps it when it is interrupted or the disk fails.
    """
    work = target.parent / f".{target.name}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir(exist_ok=True)
        lock = FileLock(work / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConvertError(
            f"{target}: another conversion is writing there; wait for it, or choose another --out"
        ) from None
    except OSError as error:
        raise ConvertError(
            f"{target}: cannot be written ({error.strerror or error}); choose another --out"
        ) from error
    keep = False
    try:
        _recover(target)
        for name in () if resume else (MODEL, MMPROJ, MANIFEST, JOURNAL):
            (work / name).unlink(missing_ok=True)
        yield work
    except BaseException as error:
        keep = resume and (
            isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__ or error, OSError)
        )
        if isinstance(error, OSError):
            raise ConvertError(f"{target}: cannot be written ({error.strerror or error})") from error
        raise
    finally:
        lock.release()
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def _beside(target: Path) -> tuple[Path, Path]:
    """Paths of a finished bundle and of the one it replaces, between the two renames of `publish`."""
    return target.parent / f".{target.name}.finished", target.parent / f".{target.name}.old"


def _recover(target: Path) -> None:
    """Complete the renames of a run that was killed between them; lose no bundle."""
    finished, old = _beside(target)
    if not target.exists() and old.is_dir():
        (finished if (finished / MANIFEST).is_file() else old).replace(target)
    for leftover in (finished, old):
        shutil.rmtree(leftover, ignore_errors=True)


def publish(work: Path, target: Path) -> None:
    """Rename the finished files' folder to the target; the old bundle stays until then."""
    finished, old = _beside(target)
    finished.mkdir()
    for name in (MODEL, MMPROJ, MANIFEST):
        (work / name).replace(finished / name)
    if target.exists():
        target.replace(old)
    finished.replace(target)
    shutil.rmtree(old, ignore_errors=True)

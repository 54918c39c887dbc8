"""The staging folder: a bundle is made in a hidden folder beside the final one, then renamed into place.

Knows folders, locks and renames; nothing of the files' content. A target that is a link stays one: all of it happens
where the link points.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pocketllava.convert.write.journal import JOURNAL, has_tensors
from pocketllava.errors import ConvertError
from pocketllava.models.bundle import MANIFEST, MMPROJ, MODEL
from pocketllava.models.files import move

logger = logging.getLogger(__name__)

LOCK = "lock"


def place_of(target: Path) -> Path:
    """The target's absolute path without links. Raises ConvertError for one that llama.cpp could not open."""
    try:
        place = target.resolve()
        str(place).encode()
    except UnicodeEncodeError as error:
        raise ConvertError(
            f"{target}: not UTF-8, which llama.cpp expects of paths; choose another --out"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a null character
        raise ConvertError(
            f"{target}: cannot be a folder ({getattr(error, 'strerror', None) or error})"
        ) from error
    return place


def check_target(target: Path, force: bool) -> None:
    """Refuse a file, a folder with other files in it, and, without `force`, an existing bundle."""
    place = place_of(target)
    if not place.exists():
        return
    try:
        names = {path.name for path in place.iterdir()}
    except NotADirectoryError:
        raise ConvertError(f"{target}: a file; --out names the folder to make") from None
    except OSError as error:
        raise ConvertError(
            f"{target}: cannot be used ({error.strerror or error}); choose another --out"
        ) from error
    if foreign := sorted(names - {MODEL, MMPROJ, MANIFEST}):
        raise ConvertError(
            f"{target}: holds {foreign[0]!r}; --out must be a new or empty folder, or a bundle"
        )
    if names and not force:
        raise ConvertError(f"{target}: holds a bundle already; use --force to replace it, or another --out")


@contextmanager
def working_folder(target: Path, resume: bool) -> Iterator[Path]:
    """A folder beside the target, for one conversion at a time; removed when the block ends.

    A killed or interrupted run leaves it behind once it holds a complete tensor; the next run to the same target
    empties it, unless `resume`. A resumable run also keeps it when the disk fails.
    """
    place = place_of(target)
    work = place.parent / f".{place.name}.partial"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
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
        _recover(place)
        _check_movable(place, target)
        if not resume:
            _empty(work, target)
        yield work
    except BaseException as error:
        keep = has_tensors(work) and (
            isinstance(error, KeyboardInterrupt) or (resume and isinstance(error.__cause__ or error, OSError))
        )
        if isinstance(error, OSError):
            raise ConvertError(f"{target}: cannot be written ({error.strerror or error})") from error
        raise
    finally:
        lock.release()
        if keep:
            logger.warning("%s: stopped; rerun with --resume to go on after the last complete tensor", target)
        else:
            shutil.rmtree(work, ignore_errors=True)


def _empty(work: Path, target: Path) -> None:
    """Remove what an earlier run left."""
    if has_tensors(work):
        logger.warning(
            "%s: begins anew, without the tensors of a stopped run; --resume goes on from them", target
        )
    for name in (MODEL, MMPROJ, MANIFEST, JOURNAL):
        (work / name).unlink(missing_ok=True)


def _check_movable(place: Path, target: Path) -> None:
    """Refuse a folder that cannot be replaced, before the work; only trying shows all of them.

    The current folder could be renamed on Linux, but whoever is in it would stay in the one that is removed.
    """
    if not place.exists():
        return
    with contextlib.suppress(OSError):
        if Path.cwd().resolve().is_relative_to(place):
            raise ConvertError(f"{target}: the current folder is in it; --out must be another folder")
    aside = _beside(place)[1]
    try:
        try:
            move(place, aside)
        finally:
            if not place.exists():
                move(aside, place)
    except OSError as error:
        raise ConvertError(
            f"{target}: a mount point, or in use ({error.strerror or error}); give a folder in it as --out"
        ) from error


def _beside(place: Path) -> tuple[Path, Path]:
    """Paths of a finished bundle and of the one it replaces, between the two renames of `publish`."""
    return place.parent / f".{place.name}.finished", place.parent / f".{place.name}.old"


def _recover(place: Path) -> None:
    """Complete the renames of a run that was killed between them; lose no bundle."""
    finished, old = _beside(place)
    if not place.exists() and old.is_dir():
        move(finished if (finished / MANIFEST).is_file() else old, place)
    for leftover in (finished, old):
        shutil.rmtree(leftover, ignore_errors=True)


def publish(work: Path, target: Path) -> None:
    """Rename the finished files' folder to the target; the old bundle stays until then.

    Raises ConvertError where the old one was opened meanwhile, which Windows does not let go of; both stay.
    """
    place = place_of(target)
    finished, old = _beside(place)
    finished.mkdir()
    for name in (MODEL, MMPROJ, MANIFEST):
        move(work / name, finished / name)
    try:
        if place.exists():
            move(place, old)
        move(finished, place)
    except OSError as error:
        raise ConvertError(
            f"{target}: in use since the conversion began ({error.strerror or error}); the new bundle is in {finished}"
            " until the next conversion: close the old one and put it in its place"
        ) from error
    shutil.rmtree(old, ignore_errors=True)

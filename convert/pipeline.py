"""Checkpoint -> Bundle: opens, plans, writes, verifies, and puts the result in its place at once.

Knows the order of the steps and where files lie; the steps themselves are in the other files. Everything
is written in a folder beside the final one, which takes its name when all of it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pocketllava.backend import cores
from pocketllava.convert.checkpoint import Checkpoint, fetch, open_checkpoint
from pocketllava.convert.mmproj import plan_mmproj
from pocketllava.convert.original import IMAGE_TOKEN, pads, space_prefix
from pocketllava.convert.plan import CHUNK_VALUES, FilePlan, SourceReader
from pocketllava.convert.quantize import MMPROJ_TYPES, TEXT_TYPES, known
from pocketllava.convert.text import plan_text
from pocketllava.convert.verify import load_test, verify_file
from pocketllava.convert.vocab import Vocab, read_vocab
from pocketllava.convert.writer import Progress, write
from pocketllava.errors import ConvertError, DiskFull
from pocketllava.models.bundle import DEFAULT_TEMPLATE, FORMAT, MANIFEST, MMPROJ, MODEL, Bundle, describe_file
from pocketllava.models.config import LlavaConfig
from pocketllava.models.preprocessing import Preprocessing, preprocessing

DISK_MARGIN_BYTES = 16 << 20
LOCK = "lock"


@dataclass(frozen=True)
class ConvertPlan:
    """Everything that a conversion will do, known before any tensor is read."""

    checkpoint: Checkpoint
    config: LlavaConfig
    preprocessing: Preprocessing
    vocab: Vocab
    template: str
    text: FilePlan
    mmproj: FilePlan
    quant: str
    mmproj_quant: str
    dropped: dict[str, str]

    @property
    def disk_bytes(self) -> int:
        """Disk that the bundle takes, headers included (to within a few kilobytes)."""
        vocabulary = sum(len(t.encode()) + 16 for t in self.vocab.tokens)
        return self.text.n_bytes + self.mmproj.n_bytes + vocabulary + (1 << 16)

    def memory_bytes(self, threads: int) -> int:
        """Memory that the conversion's buffers take at most: source, float32 and result of each piece."""
        return (2 * threads + 2) * CHUNK_VALUES * 12 + (96 << 20)


def plan(
    source: str | PathLike[str],
    *,
    quant: str = "Q4_K_M",
    mmproj: str = "F16",
    revision: str | None = None,
    vision_tower: str | PathLike[str] | None = None,
) -> ConvertPlan:
    """Open a checkpoint and plan its conversion; nothing is written. Arguments and errors as convert's."""
    quant, mmproj = known(quant, TEXT_TYPES, "--quant"), known(mmproj, MMPROJ_TYPES, "--mmproj")
    folder, identity = fetch(os.fspath(source), revision)
    try:
        tower = os.fspath(vision_tower) if vision_tower is not None else None
        checkpoint = open_checkpoint(folder, identity, tower)
        config = LlavaConfig.from_json(checkpoint.config)
        prepared = preprocessing(checkpoint.files, config.vision.image_size)
        vocab = read_vocab(checkpoint, config.text.n_vocab, config.text.bos_id, config.text.eos_ids[0])
        if checkpoint.original is not None:
            prepared, vocab = as_original(checkpoint, config, prepared, vocab)
    except OSError as error:
        raise ConvertError(f"{folder}: cannot be read ({error.strerror or error})") from error
    template = _template(checkpoint)
    dropped = dict(checkpoint.dropped)
    text = plan_text(checkpoint, config.text, vocab, template, quant, dropped)
    vision = plan_mmproj(checkpoint, config, prepared, mmproj, dropped)
    return ConvertPlan(checkpoint, config, prepared, vocab, template, text, vision, quant, mmproj, dropped)


def convert(
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    quant: str = "Q4_K_M",
    mmproj: str = "F16",
    revision: str | None = None,
    vision_tower: str | PathLike[str] | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Convert a LLaVA-1.5 checkpoint (folder or hub id) into a bundle at `out`.

    quant: type of the text model; mmproj: type of the vision tower and projector. vision_tower: folder or hub
    id of the CLIP model, for a checkpoint of the original format. progress is called with a stage ("convert",
    "verify"), bytes of the source done and in all. On any failure nothing lies under the final name, and an
    earlier bundle there is kept. Raises ConvertError and its kinds.
    """
    target = Path(out).expanduser()
    _check_target(target, force)
    return execute(
        plan(source, quant=quant, mmproj=mmproj, revision=revision, vision_tower=vision_tower),
        target,
        force=force,
        threads=threads or cores(),
        progress=progress,
    )


def execute(
    planned: ConvertPlan, target: Path, *, force: bool, threads: int, progress: Progress | None
) -> Bundle:
    """Write, verify and put in place what was planned."""
    _check_target(target, force)
    with _working_folder(target) as work:
        _check_target(target, force)  # again: a bundle may have been recovered
        _check_disk(planned, target)
        files = ((planned.text, work / MODEL), (planned.mmproj, work / MMPROJ))
        with SourceReader() as reader:
            for stage, step in (("convert", write), ("verify", verify_file)):
                advance = _Advance(stage, sum(p.source_bytes for p, _ in files), progress)
                for file_plan, path in files:
                    step(file_plan, path, reader, threads, advance)
        load_test(work / MODEL, work / MMPROJ)
        manifest = _manifest(planned, work)
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")
        _put_in_place(work, target)
    return Bundle.open(target)


class _Advance:
    """Adds up bytes and tells the caller."""

    def __init__(self, stage: str, total: int, progress: Progress | None) -> None:
        self.stage, self.total, self.progress, self.done = stage, total, progress, 0

    def __call__(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.progress:
            self.progress(self.stage, self.done, self.total)


def as_original(
    checkpoint: Checkpoint, config: LlavaConfig, prepared: Preprocessing, vocab: Vocab
) -> tuple[Preprocessing, Vocab]:
    """How the original code prepares images, and where it puts spaces."""
    tokenizer, described = (
        checkpoint.files.get("tokenizer_config.json", {}),
        "tokenizer.json" in checkpoint.files,
    )
    prefix = space_prefix(vocab.space_prefix, tokenizer, described, config.text.kind)
    padding = pads(checkpoint.original or {})
    return replace(prepared, pad_to_square=padding), replace(vocab, space_prefix=prefix)


def _template(checkpoint: Checkpoint) -> str:
    """The checkpoint's chat template if it knows images, llava-1.5's otherwise."""
    template = checkpoint.chat_template
    return template if template and "image" in template else DEFAULT_TEMPLATE


def _manifest(planned: ConvertPlan, work: Path) -> dict[str, Any]:
    from pocketllava import __version__

    config, vocab, checkpoint = planned.config, planned.vocab, planned.checkpoint
    return {
        "format": FORMAT,
        "pocketllava": __version__,
        "source": {
            **checkpoint.identity,
            "weights": {
                _name_in(f, checkpoint.folder): f.stat().st_size
                for f in sorted({t.file for t in checkpoint.tensors.values()})
            },
        },
        "types": {"model": planned.quant, "mmproj": planned.mmproj_quant},
        "files": {name: describe_file(work / name) for name in (MODEL, MMPROJ)},
        "image": {
            **_image_token(planned),
            "n_patches": config.vision.n_patches,
            "vision_width": config.vision.n_embd,
            "projected_width": config.text.n_embd,
        },
        "tokenizer": {"space_prefix": vocab.space_prefix},
        "eos_token_ids": list(config.text.eos_ids),
        "preprocessing": planned.preprocessing.to_json(),
        "chat_template": planned.template,
    }


def _name_in(file: Path, folder: Path) -> str:
    """A weight file's name; with its folder's where that is another, as a vision tower's is."""
    return file.name if file.parent == folder else f"{file.parent.name}/{file.name}"


def _image_token(planned: ConvertPlan) -> dict[str, Any]:
    """Where the template puts an image; the original format's is no row of the vocabulary."""
    if planned.checkpoint.original is not None:
        return {"token": IMAGE_TOKEN, "token_id": None}
    token_id = planned.config.image_token_id
    return {"token": planned.vocab.tokens[token_id], "token_id": token_id}


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConvertError(f"{target}: a file; --out names the folder to make")
    held = {path.name for path in target.iterdir()}
    if foreign := sorted(held - {MODEL, MMPROJ, MANIFEST}):
        raise ConvertError(
            f"{target}: holds {foreign[0]!r}; --out must be a new or empty folder, or a bundle"
        )
    if held and not force:
        raise ConvertError(f"{target}: holds a bundle already; use --force to replace it, or another --out")


def _check_disk(planned: ConvertPlan, target: Path) -> None:
    needed, free = planned.disk_bytes + DISK_MARGIN_BYTES, shutil.disk_usage(target.parent).free
    if needed > free:
        raise DiskFull(
            f"{target.parent}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed; free some space, choose"
            " another --out or a smaller --quant",
            needed,
            free,
        )


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target, for one conversion at a time; gone afterwards, whatever happens.

    A killed run leaves it behind under a hidden name; the next one to the same target clears it.
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
    try:
        _recover(target)
        for name in (MODEL, MMPROJ, MANIFEST):
            (work / name).unlink(missing_ok=True)
        yield work
    except OSError as error:
        raise ConvertError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        lock.release()
        shutil.rmtree(work, ignore_errors=True)


def _beside(target: Path) -> tuple[Path, Path]:
    """Where a finished bundle and the one it replaces lie for the moment between two renames."""
    return target.parent / f".{target.name}.finished", target.parent / f".{target.name}.old"


def _recover(target: Path) -> None:
    """Finish what a run that was killed between its last two renames left; lose no bundle."""
    finished, old = _beside(target)
    if not target.exists() and old.is_dir():
        (finished if (finished / MANIFEST).is_file() else old).replace(target)
    for leftover in (finished, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _put_in_place(work: Path, target: Path) -> None:
    """Give the finished files their final place: one rename of a folder, the old bundle kept until then."""
    finished, old = _beside(target)
    finished.mkdir()
    for name in (MODEL, MMPROJ, MANIFEST):
        (work / name).replace(finished / name)
    if target.exists():
        target.replace(old)
    finished.replace(target)
    shutil.rmtree(old, ignore_errors=True)

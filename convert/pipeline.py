"""Checkpoint -> Bundle: opens it, plans both files, and has them produced.

Knows what a conversion consists of and what bundle.json says; how files come about is in produce.py and
writer.py, where they lie meanwhile in staging.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from pocketllava.convert.plan.file_plan import CHUNK_VALUES, FilePlan
from pocketllava.convert.plan.importance import read_matrix
from pocketllava.convert.plan.mmproj import plan_mmproj
from pocketllava.convert.plan.quantize import MMPROJ_TYPES, TEXT_TYPES, known
from pocketllava.convert.plan.text import plan_text
from pocketllava.convert.read.checkpoint import Checkpoint, fetch, open_checkpoint
from pocketllava.convert.read.config import LlavaConfig
from pocketllava.convert.read.original import IMAGE_TOKEN, pads, space_prefix
from pocketllava.convert.read.templates import chat_template, end_ids
from pocketllava.convert.read.vocab import Vocab, read_vocab
from pocketllava.convert.write.pages import FLUSH_BYTES
from pocketllava.convert.write.produce import Job, produce
from pocketllava.convert.write.staging import check_target
from pocketllava.convert.write.writer import Progress
from pocketllava.errors import ConvertError
from pocketllava.llamacpp.devices import cores
from pocketllava.models.bundle import FORMAT, Bundle
from pocketllava.models.preprocessing import Preprocessing, preprocessing

PROCESS_BYTES, LOAD_TEST_BYTES = 96 << 20, 128 << 20  # measured at 7B
MAX_MESSAGE = 1000  # characters
MAX_TOKENS = 1 << 22  # sixteen times the largest vocabulary there is


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
        """Memory that the conversion takes at most.

        Pieces at work, as source, float32 and result, and waiting; what the disk does not hold yet; the process;
        the load test's.
        """
        pieces = (threads * 20 + (2 * threads + 2) * 4) * CHUNK_VALUES
        return pieces + 2 * FLUSH_BYTES + PROCESS_BYTES + LOAD_TEST_BYTES


def plan(
    source: str | PathLike[str],
    *,
    quant: str = "Q4_K_M",
    mmproj: str = "F16",
    revision: str | None = None,
    imatrix: str | PathLike[str] | None = None,
    vision_tower: str | PathLike[str] | None = None,
) -> ConvertPlan:
    """Open a checkpoint and plan its conversion; nothing is written. Arguments and errors as convert's."""
    quant, mmproj = known(quant, TEXT_TYPES, "--quant"), known(mmproj, MMPROJ_TYPES, "--mmproj")
    matrix = read_matrix(imatrix, quant)
    folder, identity = fetch(os.fspath(source), revision)
    tower = os.fspath(vision_tower) if vision_tower is not None else None
    with _damage_named(folder):
        checkpoint = open_checkpoint(folder, identity, tower)
        config = LlavaConfig.from_json(checkpoint.config)
        _check_counts(checkpoint, config)
        prepared = preprocessing(checkpoint.files, config.vision.image_size)
        vocab = read_vocab(checkpoint, config.text.n_vocab, config.text.bos_id, config.text.eos_ids[0])
        if checkpoint.original is not None:
            prepared, vocab = as_original(checkpoint, config, prepared, vocab)
        template = chat_template(checkpoint, vocab, config.image_token_id)
        end_ids(checkpoint, config, vocab)  # refused before the work
        dropped = dict(checkpoint.dropped)
        text = plan_text(checkpoint, config.text, vocab, template, quant, dropped, matrix)
        vision = plan_mmproj(checkpoint, config, prepared, mmproj, dropped)
    return ConvertPlan(checkpoint, config, prepared, vocab, template, text, vision, quant, mmproj, dropped)


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Whatever a damaged JSON file or tokenizer trips over is an error of one line, whatever it quotes of them."""
    try:
        yield
    except ConvertError as error:
        error.args = (_one_line(str(error)),)
        raise
    except OSError as error:
        raise ConvertError(f"{folder}: cannot be read ({error.strerror or error})") from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = _one_line(f"{type(error).__name__}: {error}")[:200]
        raise ConvertError(
            f"{folder}: a JSON file or the tokenizer holds what no LLaVA-1.5 checkpoint does ({reason}); download"
            " it again"
        ) from error


def _one_line(message: str) -> str:
    """Without line ends and what a terminal might obey or cannot show, the middle left out of a long one."""
    shown = "".join(c if c.isprintable() else " " for c in message)
    half = MAX_MESSAGE // 2
    return shown if len(shown) <= MAX_MESSAGE else f"{shown[:half]} ... {shown[-half:]}"


def _check_counts(checkpoint: Checkpoint, config: LlavaConfig) -> None:
    """Refuse what would take all memory or time to list, before it is listed."""
    layers, tensors = max(config.text.n_layer, config.vision.n_layer), len(checkpoint.tensors)
    if layers > tensors:
        raise ConvertError(
            f"config.json: num_hidden_layers {layers}, but the checkpoint holds {tensors} tensors; it is incomplete"
            " or its config.json describes another model"
        )
    if config.text.n_vocab > MAX_TOKENS:
        raise ConvertError(f"config.json: vocab_size {config.text.n_vocab}, expected at most {MAX_TOKENS}")


def convert(
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    quant: str = "Q4_K_M",
    mmproj: str = "F16",
    revision: str | None = None,
    imatrix: str | PathLike[str] | None = None,
    vision_tower: str | PathLike[str] | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> Bundle:
    """Convert a LLaVA-1.5 checkpoint (folder or hub id) into a bundle at `out`.

    quant: type of the text model; mmproj: type of the vision tower and projector; imatrix: a GGUF
    importance matrix, which types IQ2 and IQ3 need; vision_tower: folder or hub id of the CLIP model, for a
    checkpoint of the original format. progress is called with a stage ("convert": bytes of the source;
    "verify": bytes written), bytes done, bytes in all and the tensor's or file's name. On any failure
    nothing lies under the final name, and an earlier bundle there is kept. resume: go on from the last whole
    tensor of a run that was killed. Raises ConvertError and its kinds.
    """
    target = Path(out).expanduser()
    if not resume:
        check_target(target, force)
    return execute(
        plan(
            source, quant=quant, mmproj=mmproj, revision=revision, imatrix=imatrix, vision_tower=vision_tower
        ),
        target,
        force=force,
        threads=threads or cores(),
        progress=progress,
        resume=resume,
    )


def execute(
    planned: ConvertPlan,
    target: Path,
    *,
    force: bool,
    threads: int,
    progress: Progress | None,
    resume: bool = False,
) -> Bundle:
    """Write, verify and put in place what was planned."""
    (bundle,) = execute_all({target: planned}, force=force, threads=threads, progress=progress, resume=resume)
    return bundle


def execute_all(
    planned: Mapping[Path, ConvertPlan],
    *,
    force: bool,
    threads: int,
    progress: Progress | None,
    resume: bool = False,
) -> list[Bundle]:
    """Make several bundles of one checkpoint, such as one a type, reading it once."""
    jobs = [Job(target, p.text, p.mmproj, _manifest(p)) for target, p in planned.items()]
    return produce(jobs, force=force, threads=threads, progress=progress, resume=resume)


def as_original(
    checkpoint: Checkpoint, config: LlavaConfig, prepared: Preprocessing, vocab: Vocab
) -> tuple[Preprocessing, Vocab]:
    """How the original code prepares images, and where it puts spaces."""
    tokenizer = checkpoint.files.get("tokenizer_config.json", {})
    described = "tokenizer.json" in checkpoint.files
    prefix = space_prefix(vocab.space_prefix, tokenizer, described, config.text.kind)
    padding = pads(checkpoint.original or {})
    return replace(prepared, pad_to_square=padding), replace(vocab, space_prefix=prefix)


def _manifest(planned: ConvertPlan) -> dict[str, Any]:
    """bundle.json's content; its `files` are known when they are written."""
    from pocketllava.version import __version__

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
        "files": {},
        "image": {
            **_image_token(planned),
            "n_patches": config.vision.n_patches,
            "vision_width": config.vision.n_embd,
            "projected_width": config.text.n_embd,
        },
        "tokenizer": {"space_prefix": vocab.space_prefix},
        "eos_token_ids": end_ids(checkpoint, config, vocab),
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

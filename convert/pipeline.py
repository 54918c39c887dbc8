"""Checkpoint -> Bundle: opens it, plans both files, and has them produced.

Knows the steps of a conversion and what bundle.json records; files are written by write/produce.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from pocketllava.convert.plan.file_plan import CHUNK_VALUES, FilePlan
from pocketllava.convert.plan.importance import read_matrix
from pocketllava.convert.plan.mmproj import plan_mmproj
from pocketllava.convert.plan.quantize import MMPROJ_TYPES, TEXT_TYPES, known
from pocketllava.convert.plan.text import plan_text
from pocketllava.convert.read.checkpoint import Checkpoint, fetch, open_checkpoint
from pocketllava.convert.read.config import LlavaConfig
from pocketllava.convert.read.original import merge_type, pads, space_prefix
from pocketllava.convert.read.templates import chat_template, end_ids, put_right
from pocketllava.convert.read.tied import as_transformers_ties
from pocketllava.convert.read.vocab import Vocab, read_vocab, with_image_token
from pocketllava.convert.write.durable import FLUSH_BYTES
from pocketllava.convert.write.produce import Job, Run, produce
from pocketllava.convert.write.staging import check_target
from pocketllava.convert.write.writer import Progress
from pocketllava.errors import BundleError, ConvertError, UnsupportedCheckpoint
from pocketllava.llamacpp.children import printable
from pocketllava.llamacpp.devices import cores
from pocketllava.models.bundle import Bundle
from pocketllava.models.chat_template import check
from pocketllava.models.files import expanded, utf8
from pocketllava.models.manifest import IMAGE_TOKEN, MAX_TOKEN_ID, Manifest, Source, Types
from pocketllava.models.preprocessing import Preprocessing, check_pinpoints, preprocessing
from pocketllava.version import __version__

PROCESS_BYTES, LOAD_TEST_BYTES = 96 << 20, 128 << 20  # measured at 7B
MAX_MESSAGE = 1000  # characters


@dataclass(frozen=True)
class Opened:
    """Everything read from a checkpoint before types matter: read once, however many types are planned."""

    checkpoint: Checkpoint
    config: LlavaConfig
    preprocessing: Preprocessing
    vocab: Vocab
    template: str
    eos_token_ids: tuple[int, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvertPlan:
    """Everything that a conversion will do, known before any tensor is read."""

    opened: Opened
    text: FilePlan
    mmproj: FilePlan
    quant: str
    mmproj_quant: str
    dropped: dict[str, str]

    @property
    def checkpoint(self) -> Checkpoint:
        """The source, shared by all types planned together."""
        return self.opened.checkpoint

    @property
    def remarks(self) -> tuple[str, ...]:
        """A line about each oddity of the checkpoint that the conversion copes with."""
        return self.opened.remarks

    @property
    def disk_bytes(self) -> int:
        """Disk that the bundle takes, headers included (to within a few kilobytes)."""
        vocabulary = sum(len(t.encode()) + 16 for t in self.opened.vocab.tokens)
        return self.text.n_bytes + self.mmproj.n_bytes + vocabulary + (1 << 16)

    def memory_bytes(self, threads: int) -> int:
        """Memory that the conversion takes at most.

        Chunks at work, as source, float32 and result, and waiting; what is not flushed yet; the process; the load
        test's process.
        """
        chunks = (threads * 20 + (2 * threads + 2) * 4) * CHUNK_VALUES
        return chunks + 2 * FLUSH_BYTES + PROCESS_BYTES + LOAD_TEST_BYTES


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
    (planned,) = plan_types(
        source, [quant], mmproj=mmproj, revision=revision, imatrix=imatrix, vision_tower=vision_tower
    )
    return planned


def plan_types(
    source: str | PathLike[str],
    quants: Sequence[str],
    *,
    mmproj: str = "F16",
    revision: str | None = None,
    imatrix: str | PathLike[str] | None = None,
    vision_tower: str | PathLike[str] | None = None,
) -> list[ConvertPlan]:
    """Open a checkpoint once and plan one conversion for each type of the text model."""
    types = [known(quant, TEXT_TYPES, "--quant") for quant in quants]
    mmproj = known(mmproj, MMPROJ_TYPES, "--mmproj")
    matrix = read_matrix(imatrix, *types)
    folder, identity = fetch(os.fspath(source), revision)
    tower = os.fspath(vision_tower) if vision_tower is not None else None
    with _damage_named(folder):
        opened = _open(folder, identity, tower)
        checkpoint, config = opened.checkpoint, opened.config
        dropped = dict(checkpoint.dropped)
        texts = [
            plan_text(checkpoint, config.text, opened.vocab, opened.template, quant, dropped, matrix)
            for quant in types
        ]
        vision = plan_mmproj(checkpoint, config, opened.preprocessing, mmproj, dropped)
    return [
        ConvertPlan(opened, text, vision, quant, mmproj, dropped)
        for quant, text in zip(types, texts, strict=True)
    ]


def _open(folder: Path, identity: dict[str, str | None], tower: str | None) -> Opened:
    """Read all of the checkpoint's files but tensor data. Raises ConvertError and its kinds."""
    checkpoint = open_checkpoint(folder, identity, tower)
    config = LlavaConfig.from_json(checkpoint.config)
    _check_counts(checkpoint, config)
    checkpoint, config = as_transformers_ties(checkpoint, config)
    prepared = preprocessing(checkpoint.files, config.vision.image_size, config.tiling)
    vocab = read_vocab(checkpoint, config.text.n_vocab, config.text.bos_id, config.text.eos_ids[0])
    if checkpoint.original is not None:
        prepared, vocab = as_original(checkpoint, config, prepared, vocab)
    else:
        vocab = with_image_token(vocab, config.image_token_id)
        if config.tiling is not None:
            check_pinpoints(checkpoint.files, config.tiling)
    template, notes = put_right(chat_template(checkpoint, vocab, config.image_token_id), vocab)
    _check_template(template, checkpoint, vocab, config.image_token_id)
    ends = tuple(end_ids(checkpoint, config, vocab))
    remarks = (*checkpoint.remarks, *vocab.remarks, *notes, *_vision_remarks(config))
    return Opened(checkpoint, config, prepared, vocab, template, ends, tuple(map(_one_line, remarks)))


def _check_template(template: str, checkpoint: Checkpoint, vocab: Vocab, image_token_id: int) -> None:
    """Render it now, in bounded time: a template that shows no image would be known after the conversion only."""
    ids = {
        "bos_token": vocab.bos_id,
        "eos_token": vocab.eos_id,
        "unk_token": vocab.unk_id,
        "pad_token": vocab.pad_id,
    }
    tokens = {
        name: vocab.tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(vocab.tokens)
    }
    image_token = IMAGE_TOKEN if checkpoint.original is not None else vocab.tokens[image_token_id]
    try:
        check(template, image_token, tokens)
    except BundleError as error:
        raise UnsupportedCheckpoint(f"{checkpoint.folder}: {error}") from error


def _vision_remarks(config: LlavaConfig) -> list[str]:
    if config.vision.quick_gelu or not config.vision.class_token:  # SigLIP's own is the tanh formula
        return []
    return [
        "hidden_act gelu: llama.cpp computes the vision tower's by the tanh formula, so features differ by about 3e-3"
        " rather than 6e-4"
    ]


@contextmanager
def _damage_named(folder: Path) -> Iterator[None]:
    """Turn whatever a damaged JSON file or tokenizer raises into an error of one line."""
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
            f"{folder}: a JSON file or the tokenizer holds what no LLaVA checkpoint does ({reason}); download"
            " it again"
        ) from error


def _one_line(message: str) -> str:
    """Without line ends and control characters, the middle of a long message left out."""
    line = printable(message)
    half = MAX_MESSAGE // 2
    return line if len(line) <= MAX_MESSAGE else f"{line[:half]} ... {line[-half:]}"


def _check_counts(checkpoint: Checkpoint, config: LlavaConfig) -> None:
    """Refuse what would take all memory or time to list, before it is listed."""
    layers, tensors = max(config.text.n_layer, config.vision.n_layer), len(checkpoint.tensors)
    if layers > tensors:
        raise ConvertError(
            f"config.json: num_hidden_layers {layers}, but the checkpoint holds {tensors} tensors; it is incomplete"
            " or its config.json describes another model"
        )
    if config.text.n_vocab > MAX_TOKEN_ID:
        raise ConvertError(f"config.json: vocab_size {config.text.n_vocab}, expected at most {MAX_TOKEN_ID}")


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
    worker_command: Sequence[str] | None = None,
) -> Bundle:
    """Convert a LLaVA-1.5 or 1.6 checkpoint into a bundle.

    On any failure nothing is left under `out`, and an earlier bundle there stays.

    Args:
        source: The checkpoint's folder, or its id on the Hugging Face hub.
        out: The bundle's folder.
        quant: Type of the text model, such as "Q4_K_M" or "F16".
        mmproj: Type of the vision tower and projector: "F32", "F16", "BF16" or "Q8_0".
        revision: Branch, tag or commit of a hub id.
        imatrix: Importance matrix in GGUF, which types IQ2 and IQ3 need.
        vision_tower: Folder or hub id of the CLIP model, for a checkpoint of the original format.
        force: Replace the bundle at `out`, once the new one is verified.
        threads: Threads that quantize; the physical cores by default.
        progress: Called with a stage ("convert": bytes of the source; "verify": bytes written), bytes done, bytes
            in all, and the tensor's or file's name.
        resume: Continue after the last complete tensor of a run that was killed.
        worker_command: In a frozen application, the command that starts a Python worker for the load test, such as
            [python, "-I", "-m", "pocketllava.llamacpp.children"].

    Returns:
        The bundle, verified and load-tested.

    Raises:
        UnsupportedOption: For an unknown type, or one that needs an importance matrix.
        ConvertError: The checkpoint is damaged or of another kind, or the files cannot be written.

    Example:
        >>> bundle = convert("llava-hf/llava-1.5-7b-hf", "llava-7b", quant="Q4_K_M")
    """
    target = expanded(out)
    if not resume:
        check_target(target, force)
    planned = plan(
        source, quant=quant, mmproj=mmproj, revision=revision, imatrix=imatrix, vision_tower=vision_tower
    )
    (bundle,) = execute_all(
        {target: planned},
        force=force,
        threads=threads,
        progress=progress,
        resume=resume,
        worker_command=worker_command,
    )
    return bundle


def execute_all(
    planned: Mapping[Path, ConvertPlan],
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    worker_command: Sequence[str] | None = None,
) -> list[Bundle]:
    """Make several bundles of one checkpoint, such as one for each type, reading it once."""
    jobs = [Job(target, p.text, p.mmproj, _manifest(p)) for target, p in planned.items()]
    run = Run(
        force=force,
        threads=threads or cores(),
        progress=progress,
        resume=resume,
        worker_command=worker_command,
    )
    return produce(jobs, run)


def as_original(
    checkpoint: Checkpoint, config: LlavaConfig, prepared: Preprocessing, vocab: Vocab
) -> tuple[Preprocessing, Vocab]:
    """The original code's preparation of images and its spaces before text."""
    tokenizer = checkpoint.files.get("tokenizer_config.json", {})
    described = "tokenizer.json" in checkpoint.files
    original = checkpoint.original or {}
    prefix = space_prefix(vocab.space_prefix, tokenizer, described, config.text.kind, vocab.dummy_prefix)
    tiles = replace(config.tiling, merge=merge_type(original)) if config.tiling else None
    bos = tokenizer.get("add_bos_token") is not False  # the slow tokenizer's default
    prepared = replace(prepared, pad_to_square=pads(original), tiling=tiles)
    return prepared, replace(vocab, space_prefix=prefix, add_bos=bos)


def _manifest(planned: ConvertPlan) -> Manifest:
    """bundle.json's content; its `files` are known when they are written."""
    opened, config, checkpoint = planned.opened, planned.opened.config, planned.checkpoint
    token, token_id = _image_token(opened)
    return Manifest(
        version=__version__,
        source=Source(checkpoint.identity["id"], checkpoint.identity["revision"], _weights(checkpoint)),
        types=Types(planned.quant, planned.mmproj_quant),
        image_token=token,
        image_token_id=token_id,
        n_patches=config.vision.n_patches,
        vision_width=config.vision.n_embd,
        projected_width=config.text.n_embd,
        space_prefix=opened.vocab.space_prefix,
        strip=opened.vocab.strip,
        eos_token_ids=opened.eos_token_ids,
        preprocessing=opened.preprocessing,
        chat_template=opened.template,
    )


def _weights(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of each weight file; with its folder's name where that is another, as a vision tower's is."""
    folder = checkpoint.folder
    files = sorted({t.file for t in checkpoint.tensors.values()})
    names = [utf8(f.name if f.parent == folder else f"{f.parent.name}/{f.name}") for f in files]
    return {name: file.stat().st_size for name, file in zip(names, files, strict=True)}


def _image_token(opened: Opened) -> tuple[str, int | None]:
    """The text that stands for an image in the template, and its id; the original format's is no row."""
    if opened.checkpoint.original is not None:
        return IMAGE_TOKEN, None
    token_id = opened.config.image_token_id
    return opened.vocab.tokens[token_id], token_id

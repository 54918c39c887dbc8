"""Which input columns of each text matrix matter, summed over real evaluations of pictures and questions.

llama.cpp's llama-imatrix sees text only; here image positions, prompts and the model's own answers count.
Knows where pictures and text come from and the GGUF imatrix format; activations.py does the work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BundleError, ImageError, InputError
from pocketllava.llamacpp.guard import translated
from pocketllava.measure.activations import Activations
from pocketllava.models.files import atomic_write, read_text
from pocketllava.models.gguf_header import Header
from pocketllava.types import Message

if TYPE_CHECKING:
    from pocketllava.engine.session import Session
    from pocketllava.llava import Llava

logger = logging.getLogger(__name__)

QUESTIONS = (
    "Describe this image in detail.",
    "What is shown in this image?",
    "How many objects are there, and what colors do they have?",
    "Where are things in this picture? Answer in one sentence.",
    "Is there a person in the image? Answer yes or no.",
)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ANSWER_TOKENS = 32
CHUNK = 512  # tokens of plain text evaluated together, llama-imatrix's default
Progress = Callable[[int, int], None]  # prompts done, prompts in all


@dataclass(frozen=True)
class Collected:
    """What went into a matrix."""

    images: int
    positions: int
    entries: int


def collect(
    llava: Llava,
    source: Path,
    out: Path,
    *,
    questions: Sequence[str] = QUESTIONS,
    limit: int | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Collected:
    """Make a matrix from a folder of pictures (one question each, in turn), or from a plain text file.

    limit: pictures, or chunks of text, at most. Raises InputError, BackendError; then `out` is as it was.
    """
    _check_place(out)
    work: list[Path | list[int]] = []
    images = done = 0
    with (
        llava.session() as session,
        translated("computing the importance matrix"),
        Activations(session) as sums,
    ):
        work += _pictures(source, limit) if source.is_dir() else _chunks(session, source, chunk, limit)
        for n, piece in enumerate(work):
            if isinstance(piece, Path):
                images += (used := _one(sums, piece, questions[n % len(questions)], answer_tokens))
                done += used
            else:
                sums.text(piece)
                done += 1
            if progress:
                progress(n + 1, len(work))
    if not done:
        raise InputError(f"{source}: none of its {len(work)} pictures could be used")
    size = chunk if not images else round(sums.positions / done)
    write_matrix(out, sums.sums, [source.name], done, size)
    return Collected(images, sums.positions, len(sums.sums))


def write_matrix(
    path: Path,
    sums: Mapping[str, tuple[npt.NDArray[Any], int]],
    datasets: Sequence[str],
    chunks: int,
    size: int,
) -> Path:
    """Write sums and counts in the GGUF imatrix format; the file gets its name when it is whole."""
    from gguf import GGUFValueType as V

    from pocketllava.models.gguf_writer import Key, write_floats

    keys = [
        Key("general.type", "imatrix", V.STRING),
        Key("imatrix.datasets", list(datasets), V.ARRAY, V.STRING),
        Key("imatrix.chunk_count", chunks, V.UINT32),
        Key("imatrix.chunk_size", size, V.UINT32),
    ]
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for name, (squares, count) in sorted(sums.items()):
        arrays[f"{name}.in_sum2"] = np.asarray(squares, np.float32).reshape(1, -1)
        arrays[f"{name}.counts"] = np.full((1, 1), count, np.float32)
    try:
        with atomic_write(path) as part:
            write_floats(part, "llama", keys, arrays)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def _check_place(out: Path) -> None:
    """Before the work: a folder that exists, and no other file under that name."""
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder; --out names the file to make")
    if out.exists():
        try:
            kind = Header.read(out).keys.get("general.type")
        except BundleError:
            kind = None
        if kind != "imatrix":
            raise InputError(f"{out}: is there already and is no importance matrix; choose another --out")


def _one(sums: Activations, picture: Path, question: str, answer_tokens: int) -> int:
    """1, or 0 for a picture that cannot be read; it is said and left out."""
    try:
        sums.chat([Message("user", question, (picture,))], answer_tokens)
    except ImageError as error:
        logger.warning("left out: %s", error)
        return 0
    return 1


def _pictures(folder: Path, limit: int | None) -> Iterator[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{folder}: no pictures, expected files that end in {', '.join(SUFFIXES)}")
    yield from found[:limit]


def _chunks(session: Session, path: Path, size: int, limit: int | None) -> Iterator[list[int]]:
    """Token ids of a text in pieces, each beginning with BOS in place of its first token, as llama-imatrix has it."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: found no folder and no readable text ({error})") from error
    vocabulary = session.text.vocabulary
    begin = [vocabulary.bos] if vocabulary.adds_bos else []
    ids = [*begin, *session.text.tokenize(text.removesuffix("\n"))]
    if len(ids) < size or size > session.text.n_ctx:
        raise InputError(
            f"{path}: {len(ids)} tokens, expected at least {size}, and a context of {size} (--ctx)"
        )
    for n in range(len(ids) // size)[:limit]:
        piece = list(ids[n * size : (n + 1) * size])
        yield [*begin, *piece[len(begin) :]]

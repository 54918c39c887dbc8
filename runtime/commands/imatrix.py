"""`pocketllava imatrix`: which columns of the text model's matrices matter for pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pocketllava.commands.common import Place, load_options, quiet_option, refuse
from pocketllava.commands.completion import Model
from pocketllava.models.files import expanded

CACHING = ("kept_bytes", "cache_dir", "cache_bytes", "keep_prefixes")


@click.command()
@click.argument("model", metavar="BUNDLE", type=Model())
@click.option(
    "--images", metavar="FOLDER", type=Place(), help="Pictures; each is asked one of the questions."
)
@click.option(
    "--text", metavar="FILE", type=Place(), help="Plain text instead of pictures, in chunks of 512 tokens."
)
@click.option(
    "--questions", metavar="FILE", type=Place(), help="Questions, one a line, in turn [default: five]."
)
@click.option("--limit", type=click.IntRange(1), help="Pictures, or chunks of text, at most.")
@click.option(
    "--answer-tokens",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="So much of the model's own answer to each question counts too.",
)
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="FILE",
    type=Place(),
    help="The matrix, in llama-quantize's GGUF format.",
)
@load_options
@quiet_option("No progress bar, no summary.")
def imatrix(
    model: str,
    images: str | None,
    text: str | None,
    questions: str | None,
    limit: int | None,
    answer_tokens: int,
    out: str,
    load: dict[str, Any],
    quiet: bool,
) -> None:
    """Compute an importance matrix for `convert --imatrix` (or llama-quantize) from pictures and questions.

    BUNDLE should be F16: its activations are those of the model that will be quantized.
    """
    from tqdm import tqdm

    from pocketllava import Llava
    from pocketllava.measure.importance import QUESTIONS, collect

    if (images is None) == (text is None):
        raise click.UsageError("give either --images FOLDER or --text FILE")
    if text is not None:
        refuse("with --text", "questions", "answer_tokens", "max_pixels", *CACHING)
    source = expanded(str(images if text is None else text))
    texts = QUESTIONS if questions is None else _lines(expanded(questions))
    _check_source(source, images is not None)
    with Llava.load(model, **load) as llava, tqdm(unit="prompt", disable=True if quiet else None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        done = collect(
            llava, source, expanded(out), questions=texts, limit=limit, answer_tokens=answer_tokens,
            progress=progress,
        )  # fmt: skip
    if not quiet:
        source_text = f"{done.images} pictures" if done.images else "text"
        click.echo(f"{out}: {done.entries} matrices, {done.positions} positions of {source_text}", err=True)


def _check_source(source: Path, pictures: bool) -> None:
    from pocketllava.errors import InputError

    expected = "a folder of pictures" if pictures else "a text file"
    if not source.exists():
        raise InputError(f"{source}: found nothing, expected {expected}")
    if source.is_dir() != pictures:
        raise InputError(f"{source}: found a {'file' if pictures else 'folder'}, expected {expected}")


def _lines(path: Path) -> tuple[str, ...]:
    from pocketllava.errors import InputError
    from pocketllava.models.files import read_text

    try:
        questions = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not questions:
        raise InputError(f"{path}: no questions, expected one a line")
    return questions

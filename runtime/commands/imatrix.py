"""`pocketllava imatrix`: which columns of the text model's matrices matter for pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pocketllava.commands.common import load_options, quiet_option, refuse


@click.command()
@click.argument("model", metavar="BUNDLE")
@click.option("--images", metavar="FOLDER", help="Pictures; each is asked one of the questions.")
@click.option("--text", metavar="FILE", help="Plain text instead of pictures, in chunks of 512 tokens.")
@click.option("--questions", metavar="FILE", help="Questions, one a line, asked in turn [default: five].")
@click.option("--limit", type=click.IntRange(1), help="Pictures, or chunks of text, at most.")
@click.option(
    "--answer-tokens",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="So much of the model's own answer to each question counts too.",
)
@click.option(
    "-o", "--out", required=True, metavar="FILE", help="The matrix, in llama-quantize's GGUF format."
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
        refuse("with --text", "questions", "answer_tokens")
    source = Path(str(images if text is None else text)).expanduser()
    texts = QUESTIONS if questions is None else _lines(Path(questions).expanduser())
    _check_source(source, images is not None)
    with Llava.load(model, **load) as llava, tqdm(unit="prompt", disable=True if quiet else None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        done = collect(
            llava, source, Path(out).expanduser(), questions=texts, limit=limit, answer_tokens=answer_tokens,
            progress=progress,
        )  # fmt: skip
    if not quiet:
        source_text = f"{done.images} pictures" if done.images else "text"
        click.echo(f"{out}: {done.entries} matrices, {done.positions} positions of {source_text}", err=True)


def _check_source(source: Path, pictures: bool) -> None:
    from pocketllava.errors import InputError

    if not (source.is_dir() if pictures else source.is_file()):
        raise InputError(f"{source}: no such {'folder of pictures' if pictures else 'text file'}")


def _lines(path: Path) -> tuple[str, ...]:
    from pocketllava.errors import InputError
    from pocketllava.models.files import read_text

    try:
        questions = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not questions:
        raise InputError(f"{path}: no questions, expected one a line")
    return questions

"""`pocketllava ask`: one question about images, or without them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import (
    STDIN,
    Text,
    image_argument,
    load_options,
    quiet_option,
    refuse,
    sampling_options,
    stdin_bytes,
    stream,
    text_argument,
    warn_of_incomplete,
)
from pocketllava.commands.completion import Model
from pocketllava.errors import InputError
from pocketllava.models.files import expanded, text_of

if TYPE_CHECKING:
    from pocketllava import Answer, TokenLogprob


@click.command()
@click.argument("model", metavar="BUNDLE", type=Model())
@click.argument("words", metavar="[IMAGE]... QUESTION", nargs=-1)
@click.option("-p", "--question", metavar="TEXT", help="The question; all other arguments are images.")
@click.option("--image", "more_images", multiple=True, metavar="IMAGE", help="A further image; repeatable.")
@click.option("-sys", "--system", metavar="TEXT", type=Text(), help="A system message before the question.")
@sampling_options("truncate")
@load_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@quiet_option("Print the answer alone, no timings.")
def ask(
    model: str,
    words: tuple[str, ...],
    question: str | None,
    more_images: tuple[str, ...],
    system: str | None,
    as_json: bool,
    quiet: bool,
    load: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Ask about images, or without them.

    BUNDLE is a folder made by `convert`, or the name `demo`. An IMAGE is a path or a data URI. The last argument is
    the question; if it is a file, the question is read from stdin. One - reads an image or the question from stdin.
    The answer streams to stdout, timings go to stderr.

    \b
    pocketllava ask demo photo.jpg "What is in this photo?"
    pocketllava ask demo before.png after.png "What changed?"
    pocketllava ask demo "What is the capital of France?"
    pocketllava ask demo photo.jpg "Is there a dog?" --choices yes,no
    pocketllava ask demo photo.jpg "Describe it." --schema record.json
    pocketllava ask demo photo.jpg < question.txt
    """
    from pocketllava import Llava, Options
    from pocketllava.types import conversation

    if not as_json:
        refuse("without --json, which shows them", "top_logprobs")
    options = Options(**sampling)
    sources, source = arguments(words, more_images, question)
    images = [image_argument(source) for source in sources]
    text = _text(stdin_bytes("question")) if source == STDIN else text_argument(source)
    with Llava.load(model, **load) as llava:
        if as_json:
            answer = llava.ask(images, text, options=options, system=system)
            click.echo(json.dumps(fields(answer), ensure_ascii=False))
            if options.schema is not None and answer.finish_reason != "stop":
                warn_of_incomplete()
        else:
            stream(llava, conversation(images, text, system), options, quiet=quiet)


def fields(answer: Answer) -> dict[str, Any]:
    """An answer in JSON's types; log probabilities and choices where there are any."""
    values: dict[str, Any] = {**asdict(answer), "usage": asdict(answer.usage)}
    values["tokens_per_s"] = round(answer.timings.tokens_per_s, 2)
    del values["logprobs"], values["choices"]
    if answer.logprobs:
        values["logprobs"] = [_logprob(entry) for entry in answer.logprobs]
    if answer.choices:
        values |= {"choices": list(map(asdict, answer.choices)), "margin": answer.margin}
    return values


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    """As OpenAI's API writes it."""
    top = [{"token": token, "logprob": logprob, "bytes": list(data)} for token, logprob, data in entry.top]
    own = {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.bytes)}
    return {**own, "top_logprobs": top}


def arguments(
    words: tuple[str, ...], more_images: tuple[str, ...], question: str | None
) -> tuple[list[str], str]:
    """The images and the question, of which one may be - for stdin. Raises UsageError, InputError."""
    images = [*words, *more_images]
    if question is None:
        if not words:
            raise click.UsageError("Missing argument 'QUESTION'.")
        *first, last = words
        if last != STDIN and _exists(last):
            question = _from_stdin(last)
        else:
            images, question = [*first, *more_images], last
    if [*images, question].count(STDIN) > 1:
        raise click.UsageError("stdin is one image or the question: found more than one -")
    for image in images:
        if (
            image != STDIN and ":" not in image and not _exists(image)
        ):  # data URIs, and URLs, which are not opened
            raise InputError(
                f"{image}: no such file, expected an image; a question of several words needs quotes"
            )
    return images, question


def _from_stdin(last: str) -> str:
    """- where a question may come over stdin, which a terminal's does not."""
    if sys.stdin is None or sys.stdin.isatty():
        raise click.UsageError(f"Missing argument 'QUESTION': {last} is a file, so it is an image.")
    return STDIN


def _exists(word: str) -> bool:
    try:
        return expanded(word).exists()
    except (OSError, ValueError):  # too long, a null character
        return False


def _text(data: bytes) -> str:
    from pocketllava.chat.slash import MAX_CHARACTERS

    try:
        text = text_of(data).strip()
    except UnicodeDecodeError as error:
        raise InputError(f"question: stdin is not UTF-8 ({error})") from error
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"question: found {len(text)} characters on stdin, expected at most {MAX_CHARACTERS}"
        )
    return text

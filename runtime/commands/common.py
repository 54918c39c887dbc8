"""What commands share: options for loading a model and sampling, image arguments, an answer as it comes, warnings.

Answers go to stdout, everything else to stderr. Heavy imports stay inside functions, so that --help is quick.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.show import timing_line
from pocketllava.types import KV_TYPES, WEIGHTS

if TYPE_CHECKING:
    from pocketllava import Llava, Message, Options

MEGA = 1_000_000
GIGA = 1_000_000_000

_LOAD_OPTIONS = (
    click.option("--ctx", type=click.IntRange(1), help="Context in tokens [default: 2048]; an image takes 576."),
    click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads [default: physical cores]."),
    click.option(
        "--gpu-layers", type=click.IntRange(-1), default=-1, show_default=True,
        help="Text layers on the GPU; -1 all, 0 none.",
    ),
    click.option(
        "--kv-type", type=click.Choice(KV_TYPES), default=KV_TYPES[0], show_default=True,
        help="Type of the KV cache; q8_0 takes half the memory of f16.",
    ),
    click.option(
        "--weights", type=click.Choice(WEIGHTS), default=WEIGHTS[0], show_default=True,
        help="Read the weights into memory, or map the file; auto does what suits the free memory.",
    ),
    click.option(
        "--cache-dir", metavar="DIR", envvar="POCKETLLAVA_CACHE_DIR",
        help="Keep encoded images there, for the next time they are shown.",
    ),
    click.option(
        "--cache-size", type=click.FloatRange(0, min_open=True), default=4.0, show_default=True, metavar="GB",
        help="The oldest files in DIR go beyond this.",
    ),
    click.option(
        "--keep-prefixes", is_flag=True,
        help="Keep evaluated images in DIR too, 0.3 GB each for a 7B model.",
    ),
)  # fmt: skip

_SAMPLING_OPTIONS = (
    click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of one answer."),
    click.option(
        "--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True,
        help="0 is greedy, as the reference decodes.",
    ),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True),
    click.option(
        "--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 keeps all tokens."
    ),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Repeats what was sampled."),
)  # fmt: skip


def load_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of Llava.load, handed to the command as one dictionary, `load`."""

    @functools.wraps(command)
    def with_load(
        *args: Any,
        ctx: int | None,
        threads: int | None,
        gpu_layers: int,
        kv_type: str,
        weights: str,
        cache_dir: str | None,
        cache_size: float,
        keep_prefixes: bool,
        **rest: Any,
    ) -> None:
        if keep_prefixes and cache_dir is None:
            raise click.UsageError("--keep-prefixes needs --cache-dir DIR")
        load = {
            "n_ctx": ctx,
            "n_threads": threads,
            "n_gpu_layers": gpu_layers,
            "kv_type": kv_type,
            "weights": weights,
            "cache_dir": Path(cache_dir).expanduser() if cache_dir is not None else None,
            "cache_bytes": int(cache_size * GIGA),
            "keep_prefixes": keep_prefixes,
        }
        command(*args, load=load, **rest)

    for option in reversed(_LOAD_OPTIONS):
        with_load = option(with_load)
    return with_load


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """How tokens are chosen, handed to the command as one dictionary of Options' fields, `sampling`."""

    @functools.wraps(command)
    def with_sampling(
        *args: Any,
        max_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int | None,
        **rest: Any,
    ) -> None:
        sampling = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
        }
        command(*args, sampling=sampling, **rest)

    for option in reversed(_SAMPLING_OPTIONS):
        with_sampling = option(with_sampling)
    return with_sampling


def stream(llava: Llava, messages: list[Message], options: Options | None = None) -> str:
    """The answer to stdout as it comes, then the timings to stderr; returns its text.

    Ctrl-C stops it within a token, prompt evaluation included.
    """
    from pocketllava.engine.background import in_background

    text, timings = "", None
    for chunk in in_background(llava.stream, messages, options=options):
        click.echo(chunk.text, nl=False)
        sys.stdout.flush()
        text += chunk.text
        timings = chunk.timings or timings
    click.echo()
    if timings:
        click.echo(timing_line(timings), err=True)
    return text


def image_argument(value: str) -> str | bytes:
    """`-` is stdin; everything else is for image.load."""
    return sys.stdin.buffer.read() if value == "-" else value


def show_warnings() -> None:
    """Print the package's warnings as one line each; llama.cpp's own log stays in `logging`."""

    class Line(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            click.echo(f"warning: {record.getMessage()}", err=True)

    handler = Line(logging.WARNING)
    handler.addFilter(lambda record: not record.name.startswith("pocketllava.llama"))
    logging.getLogger("pocketllava").addHandler(handler)

"""The command line: click commands, progress bars and the only printing in the package.

Answers go to stdout, everything else to stderr; an error is one line and exit code 1 (2 for wrong usage).
Heavy imports stay inside the commands, so that --help is quick.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pocketllava.errors import PocketLlavaError
from pocketllava.show import plan_lines, size, summary_lines, timing_line, trace_lines, tree

if TYPE_CHECKING:
    from pocketllava import Llava, Message, Options

MEGA = 1_000_000


def main() -> None:
    """Entry point: errors of ours become one line; a broken pipe and Ctrl-C end quietly."""
    try:
        cli.main(prog_name="pocketllava", standalone_mode=True)
    except PocketLlavaError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def device_options(command: Callable[..., None]) -> Callable[..., None]:
    """--threads and --gpu-layers, for every command that loads a model."""
    threads = click.option(
        "--threads", type=click.IntRange(1, 1024), help="CPU threads [default: physical cores]."
    )
    layers = click.option(
        "--gpu-layers",
        type=click.IntRange(-1),
        default=-1,
        show_default=True,
        help="Text layers on the GPU; -1 all, 0 none.",
    )
    return threads(layers(command))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pocketllava")
def cli() -> None:
    """LLaVA-1.5 on a laptop, with the original model's own answers."""


@cli.command()
@click.argument("source")
@click.option(
    "--out", required=True, metavar="DIR", help="Folder to make: model.gguf, mmproj.gguf, bundle.json."
)
@click.option("--quant", default="Q4_K_M", show_default=True, metavar="TYPE", help="Type of the text model.")
@click.option(
    "--mmproj",
    default="F16",
    show_default=True,
    metavar="TYPE",
    help="Type of the vision tower: F32, F16, BF16, Q8_0.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id.")
@click.option(
    "--threads", type=click.IntRange(1, 1024), help="Threads that quantise [default: physical cores]."
)
@click.option("--force", is_flag=True, help="Replace the bundle that is there, once the new one is whole.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, and stop.")
@click.option("--quiet", is_flag=True, help="No progress bar, no summary.")
def convert(
    source: str,
    out: str,
    quant: str,
    mmproj: str,
    revision: str | None,
    threads: int | None,
    force: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Convert a LLaVA-1.5 checkpoint (a folder or a Hugging Face id) into two llama.cpp files.

    TYPE for --quant: F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q3_K_L Q3_K_M Q3_K_S Q2_K
    Q5_0 Q5_1 Q4_0 Q4_1 IQ4_NL IQ4_XS.
    """
    from pathlib import Path

    from pocketllava.backend import cores
    from pocketllava.convert import execute, plan

    if quiet:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
    planned = plan(source, quant=quant, mmproj=mmproj, revision=revision)
    if dry_run:
        click.echo("\n".join(plan_lines(planned, out, threads or cores())))
        return
    with _progress_bar(quiet) as progress:
        bundle = execute(
            planned, Path(out).expanduser(), force=force, threads=threads or cores(), progress=progress
        )
    if not quiet:
        sizes = {name: entry["bytes"] for name, entry in bundle.manifest["files"].items()}
        click.echo(", ".join(f"{bundle.folder / n} {size(b)}" for n, b in sizes.items()), err=True)


@cli.command()
@click.argument("model", metavar="BUNDLE")
@click.argument("image", metavar="IMAGE")
@click.argument("question")
@click.option(
    "--image",
    "more_images",
    multiple=True,
    metavar="IMAGE",
    help="A further image, after the first; repeatable.",
)
@click.option("--system", metavar="TEXT", help="A system message before the question.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 100),
    default=0.0,
    show_default=True,
    help="0 is greedy, as the reference decodes.",
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Repeats a sampled answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer; repeatable.")
@click.option(
    "--ctx",
    type=click.IntRange(1),
    help="Context in tokens [default: 2048]; an image takes 576.",
)
@device_options
@click.option(
    "--max-pixels", type=click.IntRange(1), default=50 * MEGA, show_default=True, help="Refuse larger images."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
def ask(
    model: str,
    image: str,
    question: str,
    more_images: tuple[str, ...],
    system: str | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: tuple[str, ...],
    ctx: int | None,
    threads: int | None,
    gpu_layers: int,
    max_pixels: int,
    as_json: bool,
) -> None:
    """Ask about an image: a path, - for stdin, or a data URI.

    BUNDLE is a folder made by `convert`, or the name `demo`. The answer streams to stdout, timings go to stderr.
    """
    from pocketllava import Llava, Options

    options = Options(max_tokens, temperature, top_p, top_k, seed, stop)
    images = [_image_argument(i) for i in (image, *more_images)]
    with Llava.load(
        model, n_ctx=ctx, n_threads=threads, n_gpu_layers=gpu_layers, max_pixels=max_pixels
    ) as llava:
        if as_json:
            answer = llava.ask(images, question, options=options, system=system)
            fields = {**asdict(answer), "tokens_per_s": round(answer.timings.tokens_per_s, 2)}
            click.echo(json.dumps(fields, ensure_ascii=False))
            return
        from pocketllava.llava import conversation

        _stream(llava, conversation(images, question, system), options)


@cli.command()
@click.argument("model", metavar="BUNDLE")
@click.option("--image", metavar="IMAGE", help="Follow this picture through the model.")
@click.option(
    "--question", default="What is in the image?", show_default=True, help="The question asked with --image."
)
@click.option("--check", is_flag=True, help="Compare both files' SHA-256 with the recorded ones.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(model: str, image: str | None, question: str, check: bool, as_json: bool) -> None:
    """Show a bundle's three parts with shapes and types, or follow one picture through them."""
    from pocketllava.names import open_bundle

    bundle = open_bundle(model)
    if check:
        bundle.check_hashes()
    if image is not None:
        from pocketllava import Llava

        with Llava.load(model, n_gpu_layers=0) as llava:
            trace = llava.trace(_image_argument(image), question)
        click.echo(json.dumps(asdict(trace)) if as_json else "\n".join(trace_lines(trace)))
        return
    if as_json:
        click.echo(json.dumps(bundle.manifest, ensure_ascii=False))
        return
    click.echo("\n".join(tree(bundle)))
    if check:
        click.echo("SHA-256 of both files: as recorded")


@cli.command()
@click.option("--image", metavar="IMAGE", help="Ask about this picture instead of a drawn one.")
@device_options
def demo(image: str | None, threads: int | None, gpu_layers: int) -> None:
    """Try it all: convert the small model in the package, draw a picture, ask five questions about it.

    The bundle and the picture are kept in your cache folder. Works without a network.
    """
    from pocketllava import Llava, Message
    from pocketllava.demo import QUESTIONS, drawn_picture
    from pocketllava.names import demo_bundle

    bundle = demo_bundle()
    shown = image or str(drawn_picture())
    picture = _image_argument(shown)
    click.echo(f"model: {bundle.folder}", err=True)
    click.echo(f"picture: {shown}", err=True)
    with Llava.load(bundle.folder, n_threads=threads, n_gpu_layers=gpu_layers) as llava:
        for question in QUESTIONS:
            click.echo(f"> {question}")
            _stream(llava, [Message("user", question, (picture,))])


@cli.command("eval")
@click.argument("model", metavar="BUNDLE")
@click.option(
    "--set",
    "questions",
    default="scenes",
    show_default=True,
    metavar="scenes|FILE.jsonl",
    help="Held-out drawn scenes, or lines of {image, question, answer or answers}.",
)
@click.option(
    "--limit", type=click.IntRange(1), help="Questions at most [default: 1000 scenes, the whole file]."
)
@click.option(
    "--results",
    metavar="FILE",
    help="Where every answer goes; a run that was stopped goes on from it [default: MODEL.SET.results.jsonl].",
)
@device_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def evaluate(
    model: str,
    questions: str,
    limit: int | None,
    results: str | None,
    threads: int | None,
    gpu_layers: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how often a bundle's answers are right.

    Exact match after normalising, VQA's soft match, and for yes/no questions POPE's precision and recall.
    """
    from pathlib import Path

    from tqdm import tqdm

    from pocketllava import Llava
    from pocketllava.evaluation import SCENES, ResultsFile, items, run, summary, what

    with Llava.load(model, n_threads=threads, n_gpu_layers=gpu_layers) as llava:
        chosen = list(items(questions, limit))
        name = "scenes" if questions == SCENES else Path(questions).stem
        file = ResultsFile(
            Path(results or f"{llava.bundle.folder.name}.{name}.results.jsonl"), what(llava.bundle, questions)
        )
        found = []
        for result in tqdm(
            run(llava, chosen, file.done), total=len(chosen), unit="question", disable=True if quiet else None
        ):
            file.add(result)
            found.append(result)
    table = summary(found)
    click.echo(json.dumps(table) if as_json else "\n".join(summary_lines(table)))
    click.echo(f"answers: {file.path}", err=True)


def _stream(llava: Llava, messages: list[Message], options: Options | None = None) -> None:
    """The answer to stdout as it comes, then the timings to stderr."""
    timings = None
    for chunk in llava.stream(messages, options=options):
        click.echo(chunk.text, nl=False)
        sys.stdout.flush()
        timings = chunk.timings or timings
    click.echo()
    if timings:
        click.echo(timing_line(timings), err=True)


def _image_argument(value: str) -> str | bytes:
    """`-` is stdin; everything else is for image.load."""
    return sys.stdin.buffer.read() if value == "-" else value


@contextmanager
def _progress_bar(quiet: bool) -> Iterator[Any]:
    """A callback that draws bytes, rate and time left; nothing when quiet or not on a terminal."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def close() -> None:
        for bar in bars.values():
            bar.close()
        bars.clear()

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            close()
            disable = True if quiet else None  # None: only on a terminal
            bars[stage] = tqdm(total=total, desc=stage, unit="B", unit_scale=True, disable=disable)
        if not bars[stage].disable:
            bars[stage].update(done - bars[stage].n)

    try:
        yield progress
    finally:
        close()


if __name__ == "__main__":
    main()

"""What commands share: options for loading a model and sampling, image arguments, an answer as it comes, messages.

Answers go to stdout, everything else to stderr. Heavy imports stay inside functions, so that --help is quick.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterable
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pocketllava.commands.show import choices_line, timing_line
from pocketllava.commands.waiting import Waiting, shown
from pocketllava.errors import InputError
from pocketllava.models.files import expanded, read_text, utf8
from pocketllava.settings import Setting, nearest, settings
from pocketllava.types import PAIR, LoadOptions, Options

if TYPE_CHECKING:
    from pocketllava import Llava, Message

    ParamType = click.ParamType[Any]
else:
    ParamType = click.ParamType  # not generic in click 8.1

Command = Callable[..., Any]
STDIN = "-"
DRAWING = ("top_p", "top_k", "min_p", "seed")
SAMPLING = (
    "max_tokens", "temperature", *DRAWING, "repeat_penalty", "presence_penalty", "frequency_penalty", "stop",
)  # fmt: skip
_PRINTED = {ord(c): c for c in "\n\t"}
INERT: dict[int, str] = dict.fromkeys((*range(32), *range(127, 160)), "\ufffd") | _PRINTED
_METAVARS = {"whole": "N", "number": "X", "texts": "TEXT", "text": "TEXT", "folder": "DIR"}


class SettingType(ParamType):
    """A setting's values, as they are typed."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.name = setting.kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text -> value. Wrong ones are wrong usage."""
        try:
            return self._setting.value(self._parsed(str(value)))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            expected = self._setting.expected.removeprefix("None or ")
            hint = nearest(str(value), self._setting.choices)
            self.fail(f"found {value!r}, expected {self._expected_units or expected}{hint}", param, ctx)

    @property
    def _expected_units(self) -> str:
        least = "above 0" if self._setting.low else "from 0 on"
        return f"{self._setting.metavar} {least}" if self._setting.unit != 1 else ""

    def _parsed(self, text: str) -> int | float | str | list[str] | list[float]:
        if self._setting.kind == "shares":
            return [float(part) for part in text.split(",")]
        if self._setting.kind == "several":
            return [part.strip() for part in text_argument(text).split(",")]
        if self._setting.kind == "whole":
            return int(text) if self._setting.unit == 1 else int(float(text) * self._setting.unit)
        return float(text) if self._setting.kind == "number" else text


class OneOf(ParamType):
    """A type's name in any case, from a list that is imported when it is needed. Names the nearest to a wrong one."""

    name = "TYPE"

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        self._names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name in upper case."""
        names = list(self._names())
        if str(value).upper() not in names:
            hint = nearest(str(value), names, cutoff=0.4)
            self.fail(f"found {value!r}{hint or ','} expected one of {', '.join(names)}", param, ctx)
        return str(value).upper()


class Text(ParamType):
    """A text, as UTF-8 whatever the locale says; `expected` where an empty one is refused."""

    name = "TEXT"

    def __init__(self, expected: str = "") -> None:
        self._expected = expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text without halves of characters, which no tokenizer takes."""
        if self._expected and not value:
            self.fail(f"found an empty text, expected {self._expected}", param, ctx)
        return text_argument(str(value))


class SchemaFile(ParamType):
    """A file with a JSON schema."""

    name = "FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The schema. Raises InputError for a file that cannot be read, or is no JSON object."""
        try:
            schema = json.loads(read_text(expanded(str(value))))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{value}: cannot be read as a JSON schema ({reason})") from error
        if not isinstance(schema, dict):
            self.fail(f"{value}: found JSON of type {type(schema).__name__}, expected an object", param, ctx)
        return schema


class Place(ParamType):
    """A path, which need not exist, or a model's name: as it was typed, but never empty."""

    name = "PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself, bytes that are not UTF-8 included."""
        return str(value) or self.fail("found an empty text, expected a path", param, ctx)


def load_options(command: Command) -> Command:
    """The options of Llava.load, handed to the command as one dictionary, `load`."""

    def check(load: dict[str, Any]) -> None:
        if load["cache_dir"] is None:
            refuse("without --cache-dir DIR", "cache_bytes", "keep_prefixes")

    return verbose_option(_with_options(LoadOptions, tuple(settings(LoadOptions)), "load", check)(command))


def pair_options(command: Command) -> Command:
    """The options of a text model without bundle.json, handed to the command as one dictionary, `pair`."""
    return _with_options(LoadOptions, PAIR, "pair")(command)


def pair_of(load: dict[str, Any]) -> dict[str, Any]:
    """Those among the options of Llava.load."""
    return {name: load[name] for name in PAIR}


def sampling_options(*without: str) -> Callable[[Command], Command]:
    """How tokens are chosen, handed to the command as one dictionary of Options' fields, `sampling`."""
    named = (name for name, setting in settings(Options).items() if setting.flags)
    names = tuple(name for name in named if name not in without)

    def check(sampling: dict[str, Any]) -> None:
        if sampling.get("choices") is not None:
            if sampling.get("schema") is not None:
                raise click.UsageError("--schema and --choices exclude each other")
            refuse("with --choices, which samples nothing", *SAMPLING, "top_logprobs")
        elif sampling["temperature"] == 0:
            refuse("at --temperature 0, which takes the likeliest token", *DRAWING)
        if sampling.get("schema") is not None:
            refuse("with --schema: JSON ends by itself", "stop")

    return _with_options(Options, names, "sampling", check)


def setting_option(options: type, name: str) -> Callable[[Command], Command]:
    """One field of Options or LoadOptions as an option of its own, with the field's name."""
    setting = settings(options)[name]
    default = getattr(options, name)
    text = setting.help
    more: dict[str, Any] = {"type": SettingType(setting)} if setting.kind != "switch" else {"is_flag": True}
    if setting.kind == "switch" and setting.optional:
        more["default"] = None
    if setting.kind == "texts":
        more |= {"multiple": True, "type": Text("one that can appear")}
    elif setting.kind == "schema":
        more["type"] = SchemaFile()
    elif setting.kind == "choice" and len(setting.choices) == 1:
        more = {"is_flag": True, "flag_value": setting.choices[0], "default": None, "type": str}
    elif default is not None and setting.kind != "switch":
        shown = f"{default / setting.unit:g}" if setting.unit != 1 else default
        more["default"], text = shown, f"{text}  [default: {shown}]"
    elif setting.default_text:
        text = f"{text}  [default: {setting.default_text}]"
    if not more.get("is_flag"):
        choices = f"[{'|'.join(setting.choices)}]" if setting.choices else _METAVARS.get(setting.kind)
        more["metavar"] = setting.metavar or choices
    return click.option(name, *setting.flags, help=text, envvar=setting.variable, **more)


def quiet_option(text: str) -> Callable[[Command], Command]:
    """-q, --quiet."""
    return click.option("-q", "--quiet", is_flag=True, help=text)


def show_log(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Print llama.cpp's log on stderr until the command ends."""

    class Line(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            click.echo(f"llama.cpp: {record.getMessage().translate(INERT)}", err=True)

    if wanted:
        ours, llama = logging.getLogger("pocketllava"), logging.getLogger("pocketllava.llama")
        handler, level = Line(), ours.level
        llama.addHandler(handler)
        ours.setLevel(logging.DEBUG)  # a child process takes over this level
        context.call_on_close(functools.partial(llama.removeHandler, handler))
        context.call_on_close(functools.partial(ours.setLevel, level))


verbose_option = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=show_log,
    help="Show llama.cpp's log on stderr.",
)


def refuse(without: str, *names: str) -> None:
    """Refuse options that were given on the command line and do nothing `without` another."""
    context = click.get_current_context()
    for parameter in context.command.params:
        if parameter.name in names and given(parameter.name):
            raise click.UsageError(f"{max(parameter.opts, key=len)} does nothing {without}")


def given(name: str) -> bool:
    """Whether an option was given on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def stream(
    llava: Llava, messages: list[Message], options: Options | None = None, *, quiet: bool = False
) -> str:
    """The answer to stdout as it comes, then the timings to stderr; returns its text.

    Ctrl-C stops it within a token, prompt evaluation included.
    """
    from pocketllava.engine.background import in_background

    text, last = "", None
    on_terminal, waiting = sys.stdout.isatty(), Waiting(quiet=quiet)
    for chunk in shown(in_background(llava.stream, messages, options=options, on_progress=waiting), waiting):
        click.echo(chunk.text.translate(INERT) if on_terminal else chunk.text, nl=False)
        sys.stdout.flush()
        text += chunk.text
        last = chunk
    click.echo()
    if last and last.choices and not quiet:
        click.echo(choices_line(last.choices), err=True)
    if last and last.timings and not quiet:
        click.echo(timing_line(last.timings), err=True)
    if options and options.schema is not None and last and last.finish_reason != "stop":
        warn_of_incomplete()
    return text


def warn_of_incomplete() -> None:
    """Mark JSON that was cut off, on stderr."""
    complain("warning", "the answer is cut off, so it is not whole JSON; give it more room with --max-tokens")


def text_argument(value: str) -> str:
    """A text of the command line, as UTF-8 whatever the locale says."""
    return utf8(value)


def image_argument(value: str) -> str | bytes:
    """`-` is stdin; everything else is for image.load."""
    return stdin_bytes("image") if value == STDIN else value


def stdin_bytes(name: str) -> bytes:
    """All of stdin. Raises InputError if there is nothing."""
    data = sys.stdin.buffer.read() if sys.stdin else b""
    if not data:
        raise InputError(f"{name}: found nothing on stdin")
    return data


def complain(kind: str, text: str) -> None:
    """A line on stderr, "kind: text"; in color and broken between words on a terminal."""
    line = f"{kind}: {' '.join(text.translate(INERT).split())}"
    if sys.stderr.isatty():
        columns = get_terminal_size().columns
        line = textwrap.fill(line, columns, break_long_words=False, break_on_hyphens=False)
    label = click.style(f"{kind}:", fg="red" if kind == "error" else "yellow")
    click.echo(label + line.removeprefix(f"{kind}:"), err=True, color=color())


def color() -> bool | None:
    """False where NO_COLOR is set (no-color.org); otherwise click looks for a terminal."""
    return False if os.environ.get("NO_COLOR") else None


def show_warnings() -> None:
    """Print the package's warnings as one line each; llama.cpp's own log stays in `logging`."""

    class Line(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            complain("warning", record.getMessage())

    handler = Line(logging.WARNING)
    handler.addFilter(lambda record: not record.name.startswith("pocketllava.llama"))
    logging.getLogger("pocketllava").addHandler(handler)


def _with_options(
    options: type,
    names: tuple[str, ...],
    argument: str,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> Callable[[Command], Command]:
    """Fields of a dataclass as options, handed to the command as one dictionary."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_values(*args: Any, **rest: Any) -> Any:
            values = {name: rest.pop(name) for name in names}
            if check:
                check(values)
            return command(*args, **{argument: values}, **rest)

        decorated: Command = with_values
        for name in reversed(names):
            decorated = setting_option(options, name)(decorated)
        return decorated

    return decorate

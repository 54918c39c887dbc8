"""Renders a chat template as transformers does, in bounded time and memory; checks one before it is used.

Knows Jinja and what templates may be given; no tokenizer and no engine. A template comes from a stranger's file and
runs at every question, so every operation that can repeat or grow is metered: loops, calls, filters, operators and
outputs. Jinja's sandbox bounds none of them but range().
"""

from __future__ import annotations

import functools
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pocketllava.errors import BundleError, InputError

MAX_SOURCE = 1 << 16  # characters; published templates take up to 20,000
MAX_SIZE = 1 << 18  # of one value: characters, items of lists and all that they hold
MAX_TOTAL = 1 << 24  # of all values that one rendering makes
MAX_BITS = 4096  # of a whole number
MAX_WIDTH = 10_000  # of an argument that sets a width or a length; what a macro's own text counts as
MAX_INDENT = 16  # of tojson
MAX_S = 1.0  # of this thread's computing, however busy the machine is
STEP = 8  # what any operation counts, beside the size that it makes
MAX_REASON = 300  # characters of an error that are shown
GROWING = {"replace", "join", "center", "indent", "format", "batch", "slice", "wordwrap", "truncate"}
# Methods of texts and lists that a template may call: none of them takes a width, and none is a format.
METHODS = {
    "capitalize", "casefold", "copy", "count", "endswith", "find", "get", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "items", "join", "keys", "lower",
    "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit",
    "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "values",
}  # fmt: skip
WITHOUT = ("pprint", "striptags", "urlize", "xmlattr")  # filters whose time grows with the square of a text
EACH, COUNTED = "each!", "counted!"  # filters under names that no template can write


class _Meter:
    """What one rendering has used."""

    def __init__(self, n_given: int) -> None:
        self.most = MAX_SIZE + 8 * n_given
        self.left = MAX_TOTAL + 64 * n_given
        self.end = time.thread_time() + MAX_S
        self.until_look = 0

    def add(self, size: int) -> None:
        """Raise SecurityError when time is up, or too much was made."""
        self.left -= size + STEP
        self.until_look -= size + STEP
        if self.left < 0 or size > self.most:
            raise SecurityError("it makes more text than any conversation needs")
        if self.until_look < 0:  # a look at the clock takes as long as a step
            self.until_look = 32 * STEP
            if time.thread_time() > self.end:
                raise SecurityError(f"it takes longer than {MAX_S:g} s")

    def checked(self, value: Any) -> Any:
        """The value itself, counted."""
        self.add(_size(value, self.most))
        return value


_METER: ContextVar[_Meter] = ContextVar("meter")


def render(source: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> str:
    """The text of a conversation, with the answer's beginning.

    messages: as transformers' templates take them. tokens: special tokens by name, such as bos_token.
    Raises BundleError for a template that cannot be rendered, InputError where it refuses the conversation itself.
    """
    try:
        return _rendered(source, messages, tokens)
    except InputError:
        raise
    except Exception as error:  # Jinja makes Python of it, which may raise anything: 1e999 is a NameError
        reason = " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        raise BundleError(f"chat template: cannot be rendered ({reason})") from error


def check(source: str, image_token: str, tokens: Mapping[str, str]) -> None:
    """Render conversations with and without a system message, an image and a second turn. Raises BundleError.

    A template may refuse a system message; each image must be shown, and shown once.
    """
    end = time.thread_time() + MAX_S
    for system in (False, True):
        for turns in (1, 2):
            for n_images in (0, 1):
                try:
                    text = render(source, _conversation(system, turns, n_images), tokens)
                except InputError as error:
                    if not system:
                        raise BundleError(f"{error}; expected a template for any conversation") from error
                    continue
                if time.thread_time() > end:
                    raise BundleError(
                        f"chat template: takes longer than {MAX_S:g} s for eight short conversations"
                    )
                if (shown := text.count(image_token)) != n_images:
                    raise BundleError(
                        f"chat template: it shows {shown} images of a conversation with {n_images}, expected each as"
                        f" one {image_token}"
                    )


def _conversation(system: bool, turns: int, n_images: int) -> list[dict[str, Any]]:
    def message(role: str, n: int = 0) -> dict[str, Any]:
        return {"role": role, "content": [*[{"type": "image"}] * n, {"type": "text", "text": "What is it?"}]}

    later = [message("assistant"), message("user")] if turns > 1 else []
    return [*([message("system")] if system else []), message("user", n_images), *later]


def _rendered(source: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> str:
    template = _compiled(source)
    meter = _Meter(_size(list(messages), MAX_TOTAL))
    token = _METER.set(meter)
    try:
        pieces = []
        for piece in template.generate(messages=messages, add_generation_prompt=True, **tokens):
            meter.add(len(piece))
            pieces.append(piece)
        return str(meter.checked("".join(pieces)))
    finally:
        _METER.reset(token)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """A jinja2 template: compiling it takes as long as tokenizing a page."""
    if len(source) > MAX_SOURCE:
        raise ValueError(f"{len(source)} characters, expected at most {MAX_SOURCE}")
    with warnings.catch_warnings():  # Python's remarks on the code that Jinja makes
        warnings.simplefilter("ignore", SyntaxWarning)
        return _environment().from_string(source)


def _size(value: Any, most: int) -> int:
    """Characters and items that a value holds, counted up to about `most`."""
    size, todo = 0, [value]
    while todo and size <= most:
        item = todo.pop()
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, Mapping):
            size += len(item)
            todo += [*item.keys(), *item.values()] if len(item) <= most else []
        elif isinstance(item, list | tuple | set):
            size += len(item)
            todo += item if len(item) <= most else []
        elif isinstance(item, range):
            size += len(item)
        elif isinstance(item, int):
            size += 1 if item.bit_length() <= MAX_BITS else most + 1
    return size


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up (utils/chat_template_utils.py), every operation metered."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _instrument(tree)
        return tree

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format is looked at before it runs: a width can be in its text."""
        wrapper = super().wrap_str_format(value)
        if wrapper is not None and re.search(r"\{[^{}]*(?:\d{4}|\{)", str(value.__self__)):
            raise SecurityError("a format with a width of thousands, or one that comes from elsewhere")
        return wrapper

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of texts, lists, dicts and numbers only what cannot grow: no format, no ljust."""
        is_method = callable(value) and isinstance(obj, str | bytes | list | tuple | dict | int | float)
        return super().is_safe_attribute(obj, attr, value) and (not is_method or attr in METHODS)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        if operator == "*":
            meter.add(max(_repeated(left, right, meter.most), _repeated(right, left, meter.most)))
        elif operator == "**" and _bits(left) * abs(right) > MAX_BITS:
            raise SecurityError("a power of more than 4096 bits")
        elif operator == "%" and isinstance(left, str):
            _expect_narrow(left)
        return meter.checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call in a template: macros, methods, globals, loops that call themselves."""
        meter = _METER.get()
        name = getattr(obj, "__name__", "")
        args = _listed(name, args)
        if isinstance(obj, LoopContext):
            args = (_each(args[0], MAX_WIDTH), *args[1:])
        if isinstance(obj, Macro | BlockReference):
            meter.add(MAX_WIDTH)  # its own text, which nothing else counts
        elif obj is not range:
            _expect_bounded(name, (getattr(obj, "__self__", None), *args), kwargs, meter)
        return meter.checked(super().call(context, obj, *args, **kwargs))


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # or constants are multiplied while compiling
        extensions=[_Generation, loopcontrols],
        finalize=_finalized,
    )
    filters: Mapping[str, Any] = {**environment.filters, "tojson": _tojson}
    environment.filters = {n: _metered(n, f) for n, f in filters.items() if n not in WITHOUT}
    environment.filters |= {EACH: _each, COUNTED: _counted}
    tests: Mapping[str, Any] = environment.tests
    environment.tests = {n: _metered(n, test) for n, test in tests.items()}
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    del environment.globals["lipsum"]
    return environment


class _Generation(Extension):
    """{% generation %}, which marks an answer for training: its content counts, the mark does not."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _instrument(tree: nodes.Template) -> None:
    """Count every step of loops, and every value that is put together or compared."""
    loops = list(tree.find_all(nodes.For))
    written = {id(loop): sum(len(text.data) for text in loop.find_all(nodes.TemplateData)) for loop in loops}
    for parent in [tree, *tree.find_all(nodes.Node)]:
        for name, value in parent.iter_fields():
            replaced = [_with_meter(n) for n in value] if isinstance(value, list) else _with_meter(value)
            setattr(parent, name, replaced)
    for loop in loops:
        loop.iter = _filtered(loop.iter, EACH, nodes.Const(written[id(loop)]))


def _with_meter(node: Any) -> Any:
    made = isinstance(node, nodes.Concat | nodes.List | nodes.Dict | nodes.Compare)
    made = made or (isinstance(node, nodes.Tuple) and node.ctx == "load")
    made = made or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
    return _filtered(node, COUNTED) if made else node


def _filtered(node: Any, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


@pass_context
def _finalized(_: Any, value: Any) -> Any:
    """What an output writes. It takes the context so that Jinja computes no output while compiling."""
    return _counted(value)


def _counted(value: Any) -> Any:
    return _METER.get().checked(value)


def _each(values: Iterable[Any], written: int) -> Iterator[Any]:
    """The values one by one; `written`: characters of text in the loop's body."""
    meter = _METER.get()
    for value in values:
        meter.add(written)
        yield value


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test whose arguments and result are counted."""

    @functools.wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        meter = _METER.get()
        args = _listed(name, args)
        _expect_bounded(name, args, kwargs, meter)
        if name == "format":
            _expect_narrow(args[0])
        result = function(*args, **kwargs)
        return _each(result, 0) if isinstance(result, Iterator) else meter.checked(result)

    return metered


def _listed(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, generators as lists where their length matters."""
    if name not in GROWING:
        return args
    return tuple(list(_each(value, 0)) if isinstance(value, Iterator) else value for value in args)


def _expect_bounded(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], meter: _Meter) -> None:
    """Raise SecurityError before a call that would make a huge value."""
    values = [*args, *kwargs.values()]
    if any(isinstance(v, int) and abs(v) > MAX_WIDTH for v in values) and name in GROWING:
        raise SecurityError(f"{name} of more than {MAX_WIDTH}")
    if name in GROWING:
        sizes = [v if isinstance(v, int) else _size(v, meter.most) for v in values]
        if math.prod(max(1, abs(size)) for size in sizes) > 64 * meter.most:
            raise SecurityError(f"{name} would make more text than any conversation needs")


def _expect_narrow(pattern: Any) -> None:
    """Raise SecurityError for a printf-style format that sets large widths."""
    if re.search(r"%[^a-zA-Z%]*(?:\d{4}|\*)", str(pattern)):
        raise SecurityError("a format with a width of thousands")


def _repeated(value: Any, times: Any, most: int) -> int:
    """Size of value * times where that repeats a text or list, else 0."""
    repeats = isinstance(value, str | bytes | list | tuple) and isinstance(times, int)
    return _size(value, most) * max(0, times) if repeats else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not (isinstance(indent, int) and indent <= MAX_INDENT):
        raise SecurityError(f"tojson with indent {str(indent)[:20]}, expected at most {MAX_INDENT}")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _refuse(message: str) -> NoReturn:
    raise InputError(f"chat template: {' '.join(str(message).split())[:MAX_REASON]}")

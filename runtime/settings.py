"""One option of a call: its values, its help and its names on the command line.

Options and LoadOptions declare each option once, as a field with a Setting; checks of arguments and the command
line's options follow from that. Knows values and texts; no model, no command line.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

from pocketllava.errors import InputError

T = TypeVar("T")
Kind = Literal[
    "whole", "number", "choice", "switch", "folder", "file", "text", "texts", "several", "shares", "schema"
]
KEY = "setting"


@dataclass(frozen=True)
class Setting:
    """The values that an option takes, and its help.

    low and high are allowed themselves, unless above_low. optional: None is allowed. flags: its names on the command
    line, where a value counts in `unit`s (gigabytes). default_text: the meaning of None, for --help.
    """

    kind: Kind
    help: str
    flags: tuple[str, ...]
    low: float = -math.inf
    high: float = math.inf
    above_low: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    default_text: str = ""
    metavar: str | None = None
    variable: str | None = None
    unit: int = 1

    @property
    def expected(self) -> str:
        """The values it takes, in words: "a whole number from 1 to 512"."""
        words = {
            "whole": f"a whole number{self._range}",
            "number": f"a number{self._range}",
            "choice": f"one of {', '.join(map(repr, self.choices))}",
            "switch": "True or False",
            "folder": "a folder's path",
            "text": "a text of whole characters",
            "file": "a file's path",
            "texts": "a text or a sequence of texts, none of them empty",
            "several": "a sequence of different texts, none of them empty",
            "shares": "numbers of at least 0, not all of them 0",
            "schema": "a JSON schema, as a dict",
        }[self.kind]
        return f"None or {words}" if self.optional else words

    @property
    def _range(self) -> str:
        if self.above_low:
            return f" above {self.low:g}, at most {self.high:g}"
        if self.high == math.inf:
            return f" of at least {self.low:g}"
        return f" from {self.low:.0f} to {self.high:.0f}"

    def value(self, given: object) -> Any:
        """The option's value, in the type that it has. Raises TypeError, ValueError for any other."""
        return None if given is None and self.optional else self._within(_TYPES[self.kind](given))

    def _within(self, value: Any) -> Any:
        if self.kind == "choice" and value not in self.choices:
            raise ValueError
        if self.kind in ("whole", "number") and not (
            self.low <= value <= self.high and not (self.above_low and value == self.low)
        ):
            raise ValueError
        return value


def option(default: Any, kind: Kind, flags: str, help: str, **more: Any) -> Any:
    """A dataclass field with its Setting. flags: "-n --max-tokens"."""
    return field(default=default, metadata={KEY: Setting(kind, help, tuple(flags.split()), **more)})


def settings(options: Any) -> dict[str, Setting]:
    """Every option of a dataclass, by field."""
    return {f.name: f.metadata[KEY] for f in fields(options)}


def check(options: Any, error: type[InputError] = InputError) -> None:
    """Check every field of a frozen dataclass, and give each the type that it has. Raises `error`."""
    for name, setting in settings(options).items():
        object.__setattr__(options, name, checked(name, setting, getattr(options, name), error))


def checked(name: str, setting: Setting, given: object, error: type[InputError] = InputError) -> Any:
    """The value of an option, in the type that it has. Raises `error`."""
    try:
        return setting.value(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: ~ of nobody
        raise error(f"{name}: found {given!r}, expected {setting.expected}") from None


def changed(options: T, changes: Mapping[str, Any], error: type[InputError] = InputError) -> T:
    """The options with some fields changed. Raises `error` for names that it does not have, and for wrong values."""
    names = settings(options)
    for name in changes:
        if name not in names:
            raise error(f"{name}: no such option{nearest(name, names)}; expected one of {', '.join(names)}")
    return replace(options, **changes)  # type: ignore[type-var]


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The name that is meant by a mistyped one, as the end of a message: ", did you mean 'seed'?"; or nothing."""
    import difflib

    by_lower = {other.lower(): other for other in names}
    alike = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return f", did you mean {by_lower[alike[0]]!r}?" if alike else ""


def _whole(value: Any) -> int:
    """numpy's integers too; not True, which Python counts as 1."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError
    return float(value)


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _choice(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str | PathLike) or not str(value):
        raise TypeError
    return Path(value).expanduser()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # halves of characters raise ValueError
    return value


def _texts(value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
        raise TypeError
    return tuple(texts)


def _several(value: object) -> tuple[str, ...]:
    texts = () if isinstance(value, str) else _texts(value)
    if not texts or len(set(texts)) < len(texts) or not all(text.strip() for text in texts):
        raise TypeError
    for text in texts:
        text.encode()  # halves of characters raise ValueError
    return texts


def _shares(value: object) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError
    shares = tuple(map(_number, value))
    if not all(0 <= share < math.inf for share in shares) or not any(shares):
        raise ValueError
    return shares


def _schema(value: object) -> dict[str, Any]:
    """A mapping; json_schema says which."""
    if not isinstance(value, Mapping):
        raise TypeError
    return dict(value)


_TYPES: dict[Kind, Callable[[Any], Any]] = {
    "whole": _whole,
    "number": _number,
    "choice": _choice,
    "switch": _switch,
    "folder": _path,
    "file": _path,
    "text": _text,
    "texts": _texts,
    "several": _several,
    "shares": _shares,
    "schema": _schema,
}

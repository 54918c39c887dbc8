"""The pickle of a torch state dict, read as data: a small stack machine that builds tables and calls nothing.

Knows the pickle opcodes that torch.save writes for a dict of tensors, and six kinds of names. No name is looked up:
any other global or opcode is refused, so nothing in a file can run. The number of opcodes is bounded, since one byte
can take a hundred of memory, and no code here recurses into nested values.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pocketllava.convert.read.sources import is_count
from pocketllava.errors import ConvertError

STORAGES = {  # torch's storage classes -> safetensors' codes
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
REBUILD, PARAMETER, ORDERED = (
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
)
CALLABLE = (REBUILD, PARAMETER, ORDERED)
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
PLAIN = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MAX_DIMENSIONS = 8
MAX_ARGUMENTS = 16  # torch's functions take up to seven
MAX_OPCODES = 1 << 19  # a 13B model's takes some 30,000; a memo's entry or an empty dict takes 100 bytes


@dataclass(frozen=True)
class Global:
    """A name that the pickle mentions; never looked up."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A run of n values in the archive's entry data/KEY."""

    key: str
    dtype: str
    n: int


@dataclass(frozen=True)
class View:
    """A tensor: where in a storage it begins, and its shape and strides, all in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """The reason why a pickle is not read."""


def read_state_dict(data: bytes, where: str) -> dict[str, View]:
    """The tensors of a state dict by name, from its pickle. Raises ConvertError, which names `where`."""
    try:
        value = _Machine().run(data)
        if type(value) is not dict:
            raise _Refused(f"found a pickled {_kind(value)}, expected a state dict of tensors")
        for name, view in value.items():
            if type(name) is not str or type(view) is not View:
                raise _Refused(
                    f"entry {str(name)[:80]!r} is a {_kind(view)}, expected a tensor under its name"
                )
        return value
    except _Refused as error:
        raise ConvertError(f"{where}: {error}") from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConvertError(f"{where}: a damaged pickle ({reason}); download the file again") from error


def _kind(value: Any) -> str:
    return value.name if type(value) is Global else type(value).__name__


class _Machine:
    """A stack, a memo and the marks; values are plain ones, Globals, Storages and Views."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """The value at STOP."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools decodes invalid escapes before step() refuses them
            for n, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
                if n == MAX_OPCODES:
                    raise _Refused(f"a pickle of more than {MAX_OPCODES} opcodes, which no state dict needs")
                if opcode.name == "STOP":
                    return self.pop()
                self.step(opcode.name, argument)
        raise _Refused("the pickle ends without STOP; download the file again")

    def pop(self) -> Any:
        if not self.stack or (self.marks and self.marks[-1] == len(self.stack)):
            raise _Refused("the pickle takes more than it put; download the file again")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise _Refused(f"the pickle fills something that is no {kind.__name__}; download the file again")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        if not self.marks:
            raise _Refused("the pickle goes back to a mark that it never set; download the file again")
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def step(self, name: str, argument: Any) -> None:
        if name in PLAIN:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in TUPLES:
            self.stack.append(tuple([self.pop() for _ in range(TUPLES[name])][::-1]))
        elif (handler := getattr(self, "on_" + name.lower(), None)) is not None:
            handler(argument)
        elif name not in ("PROTO", "FRAME"):
            raise _Refused(
                f"found the pickle opcode {name}, which no state dict needs; nothing of it was run"
            )

    def on_mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def on_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.since_mark()))

    def on_binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    on_long_binput = on_binput

    def on_memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def on_binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    on_long_binget = on_binget

    def on_global(self, argument: str) -> None:
        self.mention(".".join(argument.split(" ", 1)))

    def on_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise _Refused("the pickle names a global by something that is no text; nothing of it was run")
        self.mention(f"{module}.{name}")

    def mention(self, name: str) -> None:
        if name not in STORAGES and name not in CALLABLE:
            raise _Refused(
                f"found global {' '.join(name.split())[:120]}, expected a state dict of tensors and nothing else;"
                " nothing of it was run: do not open this file with torch, get safetensors from a source you trust"
            )
        self.stack.append(Global(name))

    def on_append(self, _: Any) -> None:
        value = self.pop()
        self.top(list).append(value)

    def on_appends(self, _: Any) -> None:
        values = self.since_mark()
        self.top(list).extend(values)

    def on_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.fill([key, value])

    def on_setitems(self, _: Any) -> None:
        self.fill(self.since_mark())

    def fill(self, flat: list[Any]) -> None:
        """Keys are text or numbers: hashing a nested tuple could take for ever."""
        keys, values = flat[::2], flat[1::2]
        if any(type(key) not in (str, int) for key in keys):
            raise _Refused("a dict's key is neither text nor a number; expected tensors under their names")
        self.top(dict).update(zip(keys, values, strict=True))

    def on_build(self, _: Any) -> None:
        """A state dict's `_metadata`: versions of modules, of no use here."""
        self.pop()
        self.top(dict)

    def on_binpersid(self, _: Any) -> None:
        match self.pop():
            case ("storage", Global(name=kind), str(key), str(), int(n)) if kind in STORAGES and is_count(n):
                self.stack.append(Storage(key, STORAGES[kind], n))
            case _:
                raise _Refused("a storage is described in an unknown way; expected what torch.save writes")

    def on_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            raise _Refused("the pickle calls something that is no name; nothing of it was run")
        if len(arguments) > MAX_ARGUMENTS:
            raise _Refused(
                f"{function.name} with {len(arguments)} arguments; expected what torch.save writes"
            )
        match (function.name, *arguments):
            case (name,) if name == ORDERED:
                self.stack.append({})
            case (name, View() as view, *_) if name == PARAMETER:
                self.stack.append(view)
            case (name, Storage() as storage, offset, tuple(shape), tuple(strides), *_) if name == REBUILD:
                self.stack.append(_view(storage, offset, shape, strides))
            case _:
                raise _Refused(
                    f"found {function.name} with unknown arguments; expected what torch.save writes"
                )


def _view(storage: Storage, offset: Any, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> View:
    possible = len(shape) == len(strides) <= MAX_DIMENSIONS
    if not possible or not all(map(is_count, (offset, *shape, *strides))):
        raise _Refused(
            f"a view of storage {storage.key[:40]!r} has no possible shape; download the file again"
        )
    return View(storage, offset, shape, strides)

"""What can go wrong inside llama.cpp, made Python's: its errors, requests to stop, and Ctrl-C inside a callback.

Knows callbacks and errors; nothing of what is computed.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from pocketllava.errors import BackendError, EngineDied, PocketLlavaError
from pocketllava.llamacpp.library import Node
from pocketllava.llamacpp.log import capture_log, device_failure, last_error

ShouldStop = Callable[[], bool]
T = TypeVar("T")


class Interrupted(BaseException):
    """Work on the engine was ended because it was asked to; never leaves the package."""


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn whatever llama_cpp raises inside the block into BackendError; the one place that does.

    Raises EngineDied if a device failed meanwhile: what it computed is not what it was asked for.
    """
    capture_log()
    try:
        yield
        check_device()
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except Exception as error:
        check_device()
        if isinstance(error, PocketLlavaError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = last_error()
        raise BackendError(f"{doing}: {reason}" + (f" ({hint})" if hint else "")) from error


def check_device() -> None:
    """Raises EngineDied once a device reported that it failed: its backend computes nothing more until made anew."""
    if line := device_failure():
        raise EngineDied(f"engine: its device failed ({line}); ask again, the model is loaded anew")


_pending: list[tuple[int, FrameType | None]] = []  # SIGINTs that came inside a call into C


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Around a call into C: a Ctrl-C ends it as soon as its callbacks can, and is raised at the block's end.

    Python runs signal handlers between its own instructions, so inside C only in callbacks, at their first
    instruction already; what is raised there is printed and lost. So meanwhile the handler takes notes only.
    """
    if threading.current_thread() is not threading.main_thread() or _pending:
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # the default action, ignored, or set by C: none of them raises
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: _pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if _pending:
            number, frame = _pending[0]
            _pending.clear()
            handler(number, frame)


class Held:
    """The first exception of a callback, to be raised once C is left: inside C it would be printed and lost."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def call(self, function: Callable[..., T], *args: object, failed: T) -> T:
        """What the function returns; `failed` once it, or an earlier one, raised, or Ctrl-C came."""
        if self.error is None and not _pending:
            try:
                return function(*args)
            except BaseException as error:
                self.error = error
        return failed

    def check(self) -> None:
        """Raise what was held, outside of C."""
        error, self.error = self.error, None
        if error is not None:
            raise error


class EvalCallback(ABC):
    """A callback for ggml's scheduler, which asks about every node and shows those that were wanted.

    Subclasses say which (`wants`) and what is done with them once they are computed (`see`). `function` is what
    a context's cb_eval takes; this object must live as long as that context. Once one of them raised, or
    should_stop() is true, no further node of the graph is computed, and check() raises that, or Interrupted.
    """

    def __init__(self) -> None:
        from llama_cpp import llama_cpp

        self._held = Held()
        self.should_stop: ShouldStop | None = None
        self.function = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)

    @abstractmethod
    def begin(self) -> None:
        """Called before each graph."""

    @abstractmethod
    def wants(self, node: Node) -> bool:
        """Whether to see a node."""

    @abstractmethod
    def see(self, node: Node) -> None:
        """Look at a node that was just computed; it may be changed."""

    def check(self) -> None:
        """After each graph: raise what happened inside it."""
        self._held.check()

    def _on_node(self, address: int, ask: bool, _user_data: Any) -> bool:
        """Wanting a node and then refusing to go on is how a graph is left; it has no other way out."""
        if ask:
            return self._held.call(self._asked, Node(address), failed=True)
        return self._held.call(self._computed, Node(address), failed=False)

    def _asked(self, node: Node) -> bool:
        if self.should_stop is not None and self.should_stop():
            raise Interrupted
        return self.wants(node)

    def _computed(self, node: Node) -> bool:
        self.see(node)
        return True


@contextlib.contextmanager
def interruptible(context: Any, should_stop: ShouldStop | None) -> Iterator[None]:
    """End llama_decode soon after Ctrl-C, or should_stop() is true: on CPUs at the next node, else after the batch.

    Raises Interrupted or KeyboardInterrupt. The interrupted batch is not in the KV cache, those before it are.
    """
    from llama_cpp import llama_cpp

    held = Held()
    stop = should_stop or (lambda: False)
    callback = llama_cpp.ggml_abort_callback(lambda _data: held.call(stop, failed=True))
    llama_cpp.llama_set_abort_callback(context, callback, None)
    try:
        with deferred_interrupts():
            yield
    except Exception:
        held.check()
        if stop():
            raise Interrupted from None
        raise
    finally:
        llama_cpp.llama_set_abort_callback(context, llama_cpp.ggml_abort_callback(), None)
    held.check()
    if stop():
        raise Interrupted

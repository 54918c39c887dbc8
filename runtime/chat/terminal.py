"""The line editor of a chat: keys, history, completion. Knows prompt_toolkit; prints nothing itself.

Imported only when a chat runs on a terminal.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.patch_stdout import patch_stdout

MENU_LINES = 6  # kept free below the line while there is something to choose
_IMAGES = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?)$", re.I)
_SAVED = re.compile(r"\.json$", re.I)
_FILES = {"/image": _IMAGES, "/load": _SAVED, "/save": _SAVED}
_NAME = re.compile(r"/\w*")
_WORD_START = re.compile(r"(?:^|(?<=\s))['\"]?")


class Terminal:
    """Reads messages, of one line or several."""

    def __init__(self, commands: Mapping[str, str], history: Path, on_change: Callable[[str], None]) -> None:
        """commands: each one's help, by name. on_change: is called with the line whenever it changes."""
        self._session: PromptSession[str] = PromptSession(
            [("bold", "> ")],
            multiline=True,
            prompt_continuation="  ",
            history=_History(history),
            completer=LineCompleter(commands),
            complete_while_typing=Condition(_completes_while_typing),
            reserve_space_for_menu=MENU_LINES,
            key_bindings=_keys(),
            enable_open_in_editor=True,
            output=create_output(always_prefer_tty=True),
        )
        self._session.default_buffer.on_text_changed += lambda buffer: on_change(buffer.text)

    def read(self) -> str:
        """A message. Raises EOFError for Ctrl-D and KeyboardInterrupt for Ctrl-C, both on an empty line."""
        with patch_stdout(raw=True):  # a warning from another thread goes above the line
            return self._session.prompt()

    @contextmanager
    def unechoed(self) -> Iterator[None]:
        """While an answer runs: keys are not echoed into it, and wait for the next line."""
        restore = _stop_echo()
        try:
            yield
        finally:
            restore()


class _History(FileHistory):
    """Lines of earlier chats; without the file there are just none."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


class LineCompleter(Completer):
    """Commands at the beginning of a line, files of the right kind elsewhere."""

    def __init__(self, commands: Mapping[str, str]) -> None:
        self._commands = commands

    def get_completions(self, document: Document, _event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        names = (
            [name for name in self._commands if f"/{name}".startswith(text)] if _NAME.fullmatch(text) else []
        )
        for name in names:
            yield Completion(f"/{name}", -len(text), display_meta=self._commands[name])
        command = text.split(" ", 1)[0]
        if not names and (command in _FILES or command[1:] not in self._commands):
            argument = text[len(command) + 1 :] if command in _FILES else text
            yield from _files(argument, _FILES.get(command, _IMAGES))


def _files(text: str, kind: re.Pattern[str]) -> Iterator[Completion]:
    """Folders and files for the longest end of a text that begins a path, which may hold spaces."""
    for start in _WORD_START.finditer(text):
        if entries := _entries(text[start.end() :], kind):
            for name, rest in entries:
                yield Completion(rest, display=name)
            return


def _entries(path: str, kind: re.Pattern[str]) -> list[tuple[str, str]]:
    """(name, the rest of it) of folders and files that complete a path."""
    folder, prefix = os.path.split(path)
    entries = []
    with suppress(OSError, ValueError, RuntimeError):
        for entry in sorted(Path(folder).expanduser().iterdir()):
            hidden = entry.name.startswith(".") and not prefix.startswith(".")
            if entry.name.startswith(prefix) and not hidden and (entry.is_dir() or kind.search(entry.name)):
                name = entry.name + ("/" if entry.is_dir() else "")
                entries.append((name, name[len(prefix) :]))
    return entries


def _completes_while_typing() -> bool:
    text = get_app().current_buffer.document.text_before_cursor
    return _NAME.fullmatch(text) is not None or text.split(" ", 1)[0] in _FILES


def _keys() -> KeyBindings:
    keys = KeyBindings()
    editing = has_focus(DEFAULT_BUFFER)  # not searching in the history

    @keys.add("enter", filter=editing)
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        menu = buffer.complete_state
        if menu and menu.current_completion and len(menu.completions) > 1:
            buffer.complete_state = None  # the choice is taken, the line goes on
        elif buffer.document.is_cursor_at_the_end and _continues(buffer.text):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=editing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=editing)
    @keys.add("<sigint>")
    def _clear_or_interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


def _continues(text: str) -> bool:
    """Whether a line ends in a backslash that is not itself escaped."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def _stop_echo() -> Callable[[], None]:
    """Let the terminal keep keys without showing them; returns the function that restores it. Ctrl-C still works."""
    if sys.platform == "win32":  # a console shows only keys that are read
        return lambda: None
    import termios

    try:
        before = termios.tcgetattr(sys.stdin)
        modes = termios.tcgetattr(sys.stdin)
        modes[0] &= ~termios.ICRNL
        modes[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)
    except (termios.error, OSError, ValueError):
        return lambda: None
    return lambda: termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

"""Every command with odd streams, places, names and environments: each works, or is one line and the right exit code.

python tests/attack/streams.py [seed] [cases]
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from attack.commands import COMMANDS, Setup, environment, hidden, program, setup
from attack.counts import Counts

TIMEOUT_S = 120
ODD_NAME = os.fsdecode(b"caf\xe9 \xff")  # Latin-1, in no locale UTF-8
LONG = "x" * 300
SHELL = 'exec "$@"'


@dataclass
class Case:
    """How a command is started. `redirect` is what a shell adds; `writes` says whether stdout can take a result."""

    command: str
    oddity: str
    arguments: list[str]
    folder: Path
    variables: dict[str, str]
    redirect: str = ""
    stdin: bytes = b"Hello.\n"
    cwd: Path | None = None
    drop: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)


Oddity = Callable[[Case, Setup], None]


def redirected(text: str) -> Oddity:
    """What a shell's redirection does."""

    def apply(case: Case, _: Setup) -> None:
        case.redirect = text

    return apply


def variables(*drop: str, **values: str) -> Oddity:
    """Environment variables, removed and set."""

    def apply(case: Case, _: Setup) -> None:
        case.variables |= values
        case.drop += drop

    return apply


def swapped(index: int, text: str) -> Oddity:
    """One argument is another text."""

    def apply(case: Case, _: Setup) -> None:
        place = index % len(case.arguments)
        case.arguments[place] = text

    return apply


def _odd_names(case: Case, s: Setup) -> None:
    """All files lie in, and go to, a folder whose name is not UTF-8."""
    odd = case.folder / ODD_NAME
    odd.mkdir()
    case.arguments = [
        a.replace(str(case.folder), str(odd)) if a.startswith(str(case.folder)) else a for a in case.arguments
    ]
    if "chat" in case.command or "ask" in case.command:
        shutil.copy(s.photo, odd / "photo.png")
        case.arguments = [str(odd / "photo.png") if a == str(s.photo) else a for a in case.arguments]


def _odd_model(case: Case, s: Setup) -> None:
    odd = case.folder / ODD_NAME
    for source in (s.bundle, s.checkpoint, s.broken.parent):
        case.arguments = [a.replace(str(source), str(odd)) for a in case.arguments]
    model = {"convert": s.checkpoint, "repair": s.broken.parent}.get(case.command, s.bundle)
    shutil.copytree(model, odd)


def _odd_words(case: Case, _: Setup) -> None:
    case.arguments = [ODD_NAME if " " in a else a for a in case.arguments]


def _odd_cwd(case: Case, _: Setup) -> None:
    case.cwd = case.folder / ODD_NAME
    case.cwd.mkdir()


def _demo_folder(case: Case, _: Setup) -> None:
    case.cwd = case.folder / "cwd"
    (case.cwd / "demo").mkdir(parents=True)


def _vanished(case: Case, _: Setup) -> None:
    gone = case.folder / "gone"
    gone.mkdir()
    case.variables["ATTACK_GONE"] = str(gone)


def _read_only(case: Case, _: Setup) -> None:
    case.cwd = Path("/proc")


def _hostile_modules(case: Case, _: Setup) -> None:
    """The current folder holds modules that would be imported by another program."""
    case.cwd = case.folder / "cwd"
    case.cwd.mkdir()
    for name in ("numpy", "queue", "random", "click", "filelock"):
        (case.cwd / f"{name}.py").write_text("print('HOSTILE'); raise SystemExit(99)")


def _without_passwd(case: Case, _: Setup) -> None:
    """A user without a home and without a line in /etc/passwd."""
    case.drop.append("HOME")
    case.before = ["unshare", "-m", "bash", "-c", 'mount --bind /dev/null /etc/passwd; exec "$@"', "bash"]


def _mounted(case: Case, _: Setup) -> None:
    """--out is a mount point."""
    out = case.folder / "new"
    out.mkdir()
    mount = f'mount -t tmpfs none {out}; exec "$@"'
    case.before = ["unshare", "-m", "bash", "-c", mount, "bash"]


def _linked(case: Case, _: Setup) -> None:
    """--out is a link to a place that is not there yet."""
    (case.folder / "elsewhere").mkdir()
    for name in ("new", "new.gguf", "results.jsonl"):
        (case.folder / name).symlink_to(case.folder / "elsewhere" / name)


def _link_to_itself(case: Case, _: Setup) -> None:
    for name in ("new", "new.gguf", "results.jsonl"):
        (case.folder / name).symlink_to(case.folder / name)


def _marked(case: Case, s: Setup) -> None:
    """Texts begin with a byte order mark."""
    case.stdin = b"\xef\xbb\xbfHello.\n"
    text = case.folder / "questions.jsonl"
    text.write_bytes(b"\xef\xbb\xbf" + s.questions.read_bytes().replace(b"photo.png", str(s.photo).encode()))
    case.arguments = [str(text) if a == str(s.questions) else a for a in case.arguments]


def _binary(case: Case, _: Setup) -> None:
    case.stdin = bytes(range(256)) * 20


ODDITIES: dict[str, Oddity] = {
    "<&-": redirected("<&-"),
    ">&-": redirected(">&-"),
    "2>&-": redirected("2>&-"),
    "<&- >&-": redirected("<&- >&-"),
    "<&- >&- 2>&-": redirected("<&- >&- 2>&-"),
    ">/dev/full": redirected(">/dev/full"),
    "2>/dev/full": redirected("2>/dev/full"),
    ">/dev/full 2>/dev/full": redirected(">/dev/full 2>/dev/full"),
    "| true": redirected("| true"),
    "2>&1 | true": redirected("2>&1 | true"),
    "</dev/zero": redirected("< <(head -c 1000000 /dev/zero)"),
    "binary stdin": _binary,
    "byte order marks": _marked,
    "no HOME": variables("HOME"),
    "HOME=/nonexistent": variables(HOME="/nonexistent"),
    "HOME=": variables(HOME=""),
    "HOME not UTF-8": variables(HOME="/tmp/" + ODD_NAME),
    "no line in passwd": _without_passwd,
    "--out a mount point": _mounted,
    "--out a dangling link": _linked,
    "--out a link to itself": _link_to_itself,
    "a folder that can only be read": _read_only,
    "LC_ALL=C": variables(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
    "latin-1 terminal": variables(PYTHONIOENCODING="latin-1"),
    "ascii, strict": variables(PYTHONIOENCODING="ascii:strict", LC_ALL="C"),
    "TERM=dumb COLUMNS=0": variables(TERM="dumb", COLUMNS="0", LINES="x"),
    "cache folder empty": variables(POCKETLLAVA_CACHE_DIR=""),
    "cache folder a file": variables(POCKETLLAVA_CACHE_DIR="/dev/null"),
    "cache folder not UTF-8": variables(POCKETLLAVA_CACHE_DIR="/tmp/" + ODD_NAME),
    "a variable not UTF-8": variables(ODD=ODD_NAME),
    "TMPDIR=/nonexistent": variables(TMPDIR="/nonexistent"),
    "names not UTF-8": _odd_names,
    "a model not UTF-8": _odd_model,
    "a question not UTF-8": _odd_words,
    "a folder not UTF-8": _odd_cwd,
    "a folder called demo": _demo_folder,
    "hostile modules": _hostile_modules,
    "the folder vanished": _vanished,
    "the last argument is empty": swapped(-1, ""),
    "the first argument is empty": swapped(1, ""),
    "the last argument is too long": swapped(-1, LONG),
    "the last argument is ~nobody": swapped(-1, "~nobody-here/x"),
    "the last argument is .": swapped(-1, "."),
    "the last argument is /": swapped(-1, "/"),
    "the last argument is /dev/null": swapped(-1, "/dev/null"),
    "the last argument is /dev/full": swapped(-1, "/dev/full"),
    "the last argument is not UTF-8": swapped(-1, ODD_NAME),
}
MAY_MOUNT = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
if not MAY_MOUNT:
    del ODDITIES["no line in passwd"], ODDITIES["--out a mount point"]


def run(seed: int, cases: int, folder: Path) -> Counts:
    """So many pairs of a command and an oddity, drawn without repetition while there are new ones."""
    counts, rng = Counts(), random.Random(seed)
    prepared = setup(folder / "setup")
    pairs = [(c, o) for c in COMMANDS for o in ODDITIES]
    rng.shuffle(pairs)
    for n in range(cases):
        _try(prepared, *pairs[n % len(pairs)], folder / f"case{n}", counts)
    return counts


def one(prepared: Setup, command: str, oddity: str, place: Path) -> Counts:
    """One command with one oddity."""
    counts = Counts()
    _try(prepared, command, oddity, place, counts)
    return counts


def _try(prepared: Setup, command: str, oddity: str, place: Path, counts: Counts) -> None:
    place.mkdir()
    case = Case(command, oddity, COMMANDS[command](prepared, place), place, environment(prepared.home))
    ODDITIES[oddity](case, prepared)
    _judge(case, prepared, counts)
    shutil.rmtree(place, ignore_errors=True)


def _judge(case: Case, prepared: Setup, counts: Counts) -> None:
    counts.cases += 1
    name = f"{case.command} with {case.oddity}"
    try:
        code, stdout, stderr = _start(case, prepared)
    except subprocess.TimeoutExpired:
        counts.hangs += 1
        counts.failures.append(f"{name}: no end in {TIMEOUT_S} s")
        return
    text = (stdout + stderr).decode("utf-8", "replace")
    if code < 0 or code > 128:
        counts.crashes += 1
        counts.failures.append(f"{name}: exit code {code}: {text[-300:]}")
    elif "Traceback" in text or "Exception ignored" in text:
        counts.tracebacks += 1
        counts.failures.append(f"{name}: {text[-300:]}")
    elif fault := _fault(case, code, stderr.decode("utf-8", "replace")):
        counts.wrong += 1
        counts.failures.append(f"{name}: {fault}: {text[-300:]}")
    elif code:
        counts.refused += 1
    else:
        counts.accepted += 1


def _fault(case: Case, code: int, stderr: str) -> str:
    """What is wrong with an end that was no crash."""
    errors = [line for line in stderr.splitlines() if line.startswith(("error: ", "Error: "))]
    quiet = "2>" in case.redirect or case.redirect.startswith("<&- >&- 2") or "|" in case.redirect
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if code == 0 and errors:
        return "an error, and exit code 0" if "chat" not in case.command else ""
    if code and len(errors) != 1 and not quiet and "chat" not in case.command:
        return f"exit code {code} and {len(errors)} lines of error"
    if "HOSTILE" in stderr:
        return "ran a module of the current folder"
    if left := [
        name for place in (case.folder, case.folder / "elsewhere") if place.is_dir() for name in hidden(place)
    ]:
        return f"left {left}"
    return ""


def _start(case: Case, prepared: Setup) -> tuple[int, bytes, bytes]:
    """(exit code, stdout, stderr) of the case, from a shell."""
    env = {name: value for name, value in case.variables.items() if name not in case.drop}
    script = SHELL if not case.redirect else f'"$@" {case.redirect}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        [*case.before, "bash", "-c", script, "bash", *program(prepared, case.arguments)],
        input=case.stdin, capture_output=True, cwd=case.cwd or case.folder, env=env, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        numbers = [int(word) for word in sys.argv[1:]]
        result = run(numbers[0] if numbers else 0, numbers[1] if len(numbers) > 1 else 60, Path(scratch))
    print(*result.failures, sep="\n")
    print(result)

"""What the command line takes: images and a question in any form, short options, and usage that is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from pocketllava import Bundle, InputError
from pocketllava.cli import SECTIONS, cli
from pocketllava.commands.ask import arguments
from pocketllava.commands.common import complain

PHOTO = str(Path(__file__).parent / "photo.jpg")
URI = "data:image/png;base64,AAAA"


def run(*words: str, stdin: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
    """`python -m pocketllava`, as a user may start it."""
    command = [sys.executable, "-m", "pocketllava", *words]
    return subprocess.run(
        command, input=stdin, capture_output=True, check=False, env={**os.environ, **variables}
    )


@pytest.mark.parametrize(
    ("words", "more", "question", "images", "text"),
    [
        (("a.png", "What?"), (), None, ["a.png"], "What?"),
        (("a.png", "b.PNG", "What?"), (), None, ["a.png", "b.PNG"], "What?"),
        (("a.png", "What?"), ("b.PNG",), None, ["a.png", "b.PNG"], "What?"),
        (("What?",), (), None, [], "What?"),
        (("What?",), ("a.png",), None, ["a.png"], "What?"),
        (("a.png", "b.PNG"), (), "What?", ["a.png", "b.PNG"], "What?"),
        ((), (), "What?", [], "What?"),
        (("a.png",), (), "-", ["a.png"], "-"),
        (("-", "What?"), (), None, ["-"], "What?"),
        (("a.png", "-"), (), None, ["a.png"], "-"),
        (("-",), (), None, [], "-"),
        (("a.png",), (), None, ["a.png"], "-"),  # stdin is not a terminal here
        (("a.png", "my photo.jpg"), (), None, ["a.png", "my photo.jpg"], "-"),
        ((URI, "What?"), (), None, [URI], "What?"),
        (("~/a.png", "What?"), (), None, ["~/a.png"], "What?"),
    ],
)
def test_words_are_images_and_then_the_question(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    more: tuple[str, ...],
    question: str | None,
    images: list[str],
    text: str,
) -> None:
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert arguments(words, more, question) == (images, text)


@pytest.mark.parametrize(
    ("words", "question"), [((), None), (("-", "-"), None), (("-",), "-"), (("-", "a.png"), None)]
)
def test_stdin_is_one_thing_and_a_question_is_needed(
    here: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], question: str | None
) -> None:
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(click.UsageError, match=r"Missing argument 'QUESTION'|found more than one -"):
            arguments(words, (), question)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
def test_a_terminal_is_not_waited_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, inside = os.openpty()
    with os.fdopen(inside) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(click.UsageError, match=r"^Missing argument 'QUESTION': a\.png is a file"):
            arguments(("a.png",), (), None)
        assert arguments(("a.png", "What?"), (), None) == (["a.png"], "What?")
    os.close(outside)


def test_a_question_without_quotes_says_so(here: Path) -> None:
    with pytest.raises(InputError, match=r"^What: no such file, expected an image; .* needs quotes$"):
        arguments(("a.png", "What", "is", "it?"), (), None)


def test_a_question_over_stdin_and_text_alone(bundle: Bundle) -> None:
    model = str(bundle.folder)
    short = ("-n", "3", "--json")
    by_word = json.loads(run("ask", model, PHOTO, "Größe?", *short).stdout)
    for words in ((PHOTO,), (PHOTO, "-"), (PHOTO, "-p", "-")):
        done = run("ask", model, *words, *short, stdin="\ufeffGröße?\n".encode(), PYTHONIOENCODING="cp1252")
        assert json.loads(done.stdout)["token_ids"] == by_word["token_ids"]
    alone = json.loads(run("ask", model, "Größe?", *short).stdout)
    assert alone["usage"]["image_tokens"] == 0 < alone["usage"]["prompt_tokens"]
    assert alone["usage"]["completion_tokens"] == len(alone["token_ids"]) == 3
    for stdin, message in (
        (b"", "question: found nothing on stdin"),
        (b"\xff", "question: stdin is not UTF-8"),
    ):
        done = run("ask", model, PHOTO, stdin=stdin)
        assert (done.returncode, done.stdout) == (1, b"")
        assert message in done.stderr.decode()


def test_short_options_and_quiet(bundle: Bundle) -> None:
    done = run(
        "ask", str(bundle.folder), "What?", "-q", "-n", "3", "-c", "512", "-t", "1", "-ngl", "0", "-s", "7",
        "--temp", "0.5", "-sys", "Be brief.", "--min-p", "0.1", "--repeat-penalty", "1.1",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.strip()


@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_text_is_utf8_whatever_the_locale(bundle: Bundle, locale: dict[str, str]) -> None:
    shown = run("inspect", str(bundle.folder), **locale)
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert "├── vision tower" in shown.stdout.decode("utf-8")
    question = ("ask", str(bundle.folder), "Größe 漢字?", "-n", "3", "--json", "-sys", "Sprich größer.")
    answers = [json.loads(run(*question, **variables).stdout) for variables in (locale, {"PYTHONUTF8": "1"})]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    wrong = run("ask", "漢字", "a", **locale)
    assert wrong.returncode == 1
    assert "found nothing, expected a folder" in wrong.stderr.decode("utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ask", "demo", "a", "--cache-size", "1"), "--cache-size does nothing without --cache-dir"),
        (("ask", "demo", "a", "--keep-prefixes"), "--keep-prefixes does nothing without --cache-dir"),
        (("inspect", "demo", "--question", "a"), "--question does nothing without --image"),
        (("inspect", "demo", "--image", PHOTO, "--ctx", "512"), "--ctx does nothing with --image"),
        (("convert", ".", "--out", "x", "--revision", "main"), "--revision does nothing with a folder"),
        (("convert", "--repair", "x", "--quant", "Q8_0"), "--quant does nothing with --repair"),
        (
            ("imatrix", "demo", "--text", "x", "--out", "y", "--questions", "z"),
            "--questions does nothing with --text",
        ),
        (("convert", ".", "--out", "x", "--quant", "Q4_K_N"), "found 'Q4_K_N', did you mean 'Q4_K_"),
        (("convert", ".", "--out", "x", "--quant", "zzz"), "found 'zzz', expected one of F32, F16"),
        (
            ("convert", ".", "--out", "x", "--mmproj", "Q8"),
            "found 'Q8', did you mean 'Q8_0'? expected one of F32",
        ),
        (("ask", "demo", "a", "-n", "0"), "found '0', expected a whole number from 1 to"),
        (("ask", "demo", "a", "-n", "2.5"), "found '2.5', expected a whole number"),
        (("ask", "demo", "a", "--temp", "nan"), "found 'nan', expected a number from 0 to 100"),
        (
            ("ask", "demo", "a", "--kv-type", "q8"),
            "found 'q8', expected one of 'auto', 'f16', 'q8_0', did you mean 'q8_0'?",
        ),
        (("ask", "demo", "a", "--cache-dir", "x", "--cache-size", "nan"), "found 'nan', expected GB above 0"),
        (("ask", "demo", "a", "--stop", ""), "found an empty text"),
        (("aks", "demo"), "No such command 'aks', did you mean 'ask'?"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_was_expected(words: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(cli, words, terminal_width=300)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_options_from_the_environment_are_not_refused(bundle: Bundle, tmp_path: Path) -> None:
    done = run(
        "ask", str(bundle.folder), PHOTO, "a", "-n", "1", "--cache-size", "0.5",
        POCKETLLAVA_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "cache").rglob("*"))


def test_help_groups_every_command_by_what_a_person_wants() -> None:
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=100).output
    assert [command for section in SECTIONS.values() for command in section] == list(cli.commands.values())
    places = [shown.index(title) for title in SECTIONS]
    assert places == sorted(places)
    assert "..." not in shown.removeprefix("Usage: cli [OPTIONS] COMMAND [ARGS]...")  # cut off
    for name in cli.commands:
        text = CliRunner().invoke(cli, [name, "--help"]).output
        assert "Usage: " in text


def test_errors_wrap_at_words_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "win32":
        pytest.skip("pseudo-terminals are POSIX's")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    outside, inside = os.openpty()
    with os.fdopen(inside, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        complain(
            "error", "model: " + "several words " * 8 + "a-long-path/without-spaces/which-stays-in-one-piece"
        )
    lines = os.read(outside, 4096).decode().split("\r\n")
    os.close(outside)
    assert lines[0].startswith("error: model: several words")
    assert max(map(len, lines[:-2])) <= 40
    assert lines[-2] == "a-long-path/without-spaces/which-stays-in-one-piece"


def test_errors_stay_one_line_elsewhere(capsys: Any) -> None:
    complain("error", "several words " * 40)
    assert capsys.readouterr().err.count("\n") == 1


# A shell that starts pytest with & has it ignore SIGINT, and its children after it.
OBEDIENT = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from pocketllava.__main__ import main; main()"
)
LONG = ("--ctx", "4096", "-n", "4000")


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C cannot be sent to one process there")
def test_ctrl_c_ends_an_answer_with_exit_code_130(endless: Bundle) -> None:
    command = [sys.executable, "-c", OBEDIENT, "ask", str(endless.folder), "Count.", *LONG]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read().strip() == b""


def test_a_closed_pipe_ends_an_answer_quietly(endless: Bundle) -> None:
    command = [sys.executable, "-m", "pocketllava", "ask", str(endless.folder), "Count.", *LONG]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read().strip() == b""

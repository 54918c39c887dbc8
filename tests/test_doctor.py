"""`pocketllava doctor` says what is there and whether answers are right, and never falls ill itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pocketllava.cli import cli
from pocketllava.commands.doctor import lines
from pocketllava.measure.health import Health, SelfTest, extras, folders, versions
from pocketllava.measure.self_test import recorded
from pocketllava.models.demo.picture import QUESTIONS

pytestmark = pytest.mark.slow


def run(*arguments: str) -> Result:
    """The command's result."""
    return CliRunner().invoke(cli, ["doctor", *arguments])


def test_the_demo_answers_as_recorded() -> None:
    done = run("--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["self_test"]["n_equal"], found["self_test"]["failure"]) == (len(QUESTIONS), "")
    assert found["library"]["free_bytes"] > 0
    assert "CPU : " in found["library"]["built"]
    assert found["versions"]["llama-cpp-python"] == versions()["llama-cpp-python"]
    assert found["is_well"]


def test_every_question_has_its_answer_recorded() -> None:
    assert set(recorded()) == set(QUESTIONS)


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_no_place_to_write_is_a_line_and_exit_code_1(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo cannot be converted where there is no cache folder."""
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("HOME", str(blocked))
    monkeypatch.setenv("XDG_CACHE_HOME" if variable == "XDG_CACHE_HOME" else "HOME", str(blocked))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False) if variable == "HOME" else None
    done = run()
    assert done.exit_code == 1, done.output
    assert "self-test  failed: the demo does not answer (" in done.output
    assert "cannot be used as the cache folder" in done.output
    assert "Traceback" not in done.output


def health(**changes: Any) -> Health:
    """A report of an imagined machine."""
    fields: dict[str, Any] = {
        "versions": versions(),
        "library": {"built": "CPU : AVX2 = 1", "cpu": "CPU, 2 threads", "free_bytes": 10**9, "devices": [], "limits": []},
        "library_failure": "",
        "folders": folders(),
        "extras": extras(),
        "self_test": SelfTest(5, 5, ("CPU", "CPU"), 1.0),
    }  # fmt: skip
    return Health(**{**fields, **changes})


def test_a_library_of_another_cpu_is_said() -> None:
    ill = health(
        library={}, library_failure="signal SIGILL: without a message", self_test=SelfTest(0, 5, failure="x")
    )
    text = "\n".join(lines(ill))
    assert "llama.cpp  does not run here (signal SIGILL" in text
    assert not ill.is_well


def test_devices_limits_and_wrong_answers_are_said() -> None:
    library = {
        **health().library,
        "devices": [{"name": "CUDA0 (a card)", "free": 2 * 10**9, "total": 8 * 10**9}],
        "limits": [["memory.max of /", 5 * 10**9]],
    }
    wrong = SelfTest(4, 5, ("CUDA0", "CUDA0"), 1.0, "'How many?': found '3', expected '4'")
    text = "\n".join(lines(health(library=library, self_test=wrong)))
    assert "device     CUDA0 (a card): 2.00 GB free of 8.00 GB" in text
    assert "memory.max of / leaves 5.00 GB" in text
    assert (
        "4 of 5 answers of the demo as recorded (1.0 s, text: CUDA0, vision: CUDA0); failed: 'How many?'"
        in text
    )


def test_extras_are_those_of_the_package() -> None:
    assert {"convert", "heic", "serve", "structured"} <= set(extras())
    assert "dev" not in extras()

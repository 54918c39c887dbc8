"""Shell completion, in the shells themselves where they are installed; and llama.cpp's log on request."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pocketllava import Bundle
from pocketllava.cli import cli
from pocketllava.models.store import MANIFEST, VARIABLE, Store

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
BASH = """
source <(pocketllava completion bash)
while IFS= read -r line; do
    IFS=' ' read -r -a COMP_WORDS <<< "$line"
    [[ $line == *' ' ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
    _pocketllava_completion pocketllava 2> /dev/null
    echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A shell's, with three models in the store."""
    store = Store(tmp_path / "store")
    for name in ("llava-1.5-7b:q4_k_m", "llava-1.5-7b:q8_0", "mine"):
        with store.create(name) as folder:
            (folder / MANIFEST).write_text("{}")
    return {**os.environ, VARIABLE: str(store.root), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def answers(words: str, shell: str, environment: dict[str, str], cword: str) -> list[str]:
    """What the program itself answers a shell's script."""
    variables = {"COMP_WORDS": words, "COMP_CWORD": cword, "_POCKETLLAVA_COMPLETE": f"{shell}_complete"}
    done = subprocess.run(
        [BIN / "pocketllava"], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(sys.platform == "win32" or shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_names_around_their_colon(environment: dict[str, str]) -> None:
    lines = {
        "pocketllava pu": "pull",
        "pocketllava ask l": "llava-1.5-7b:q4_k_m llava-1.5-7b:q8_0",
        "pocketllava ask llava-1.5-7b :": "q4_k_m q8_0",  # the words that bash makes of llava-1.5-7b:
        "pocketllava chat llava-1.5-7b : q8": "q8_0",
        "pocketllava rm ": "llava-1.5-7b:q4_k_m llava-1.5-7b:q8_0 mine",
        "pocketllava serve d": "demo",
    }
    done = subprocess.run(
        ["bash", "-c", BASH],
        input="\n".join(lines) + "\n",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == list(lines.values())


def test_zsh_and_fish_get_whole_names_and_folders(environment: dict[str, str]) -> None:
    assert answers("pocketllava ask llava-1.5-7b:q8", "zsh", environment, "2")[:2] == [
        "plain",
        "llava-1.5-7b:q8_0",
    ]
    assert answers("pocketllava ask m", "zsh", environment, "2") == ["plain", "mine", "_", "file", "m", "_"]
    assert answers("pocketllava ask m", "fish", environment, "m") == ["plain,mine", "file,m"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_each_shell_has_its_script(shell: str) -> None:
    assert "_pocketllava_completion" in CliRunner().invoke(cli, ["completion", shell]).output


def test_verbose_shows_llama_cpps_log(bundle: Bundle, environment: dict[str, str]) -> None:
    command = [BIN / "pocketllava", "ask", bundle.folder, "Hello", "-n", "1", "-q"]
    quiet = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    loud = subprocess.run(
        [*command, "--verbose"], env=environment, capture_output=True, text=True, check=True
    )
    assert quiet.stderr == ""
    assert "llama.cpp: llama_model_loader: " in loud.stderr
    assert loud.stdout == quiet.stdout

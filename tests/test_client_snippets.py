"""The snippets of docs/clients.md and docs/llm.md, run as they are against a server on another port; `make clients`."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import SCENE, serving

pytest.importorskip("openai", reason="real clients: make clients")

from click.testing import CliRunner
from llm.cli import cli

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / name for name in ("clients.md", "llm.md")]
WRITTEN = "http://127.0.0.1:8080"
# LlamaIndex needs an older openai than the others, so it has an environment of its own.
BIN = "Scripts" if os.name == "nt" else "bin"
LLAMA_INDEX = ROOT / "build" / "llama-index" / BIN / "python"


def blocks(language: str) -> list[Any]:
    """Fenced blocks of that language, each named by its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            found.append(pytest.param(match[1], id=f"{page.name}:{text[: match.start()].count(chr(10)) + 1}"))
    return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The server's."""
    with serving() as address:
        yield address


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with the picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    shutil.copy(SCENE, tmp_path / "scene.png")
    return tmp_path


@pytest.mark.parametrize("block", blocks("py"))
def test_python_prints_what_its_comments_say(
    block: str, address: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = block.replace(WRITTEN, address)
    if "llama_index" in code:
        if not LLAMA_INDEX.exists():
            pytest.skip("LlamaIndex: make clients")
        subprocess.run([str(LLAMA_INDEX), "-c", code], check=True, timeout=120)
    else:
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})
    expected = re.findall(r"^ *print\(.*  # (.+)$", block, re.MULTILINE)
    assert expected
    assert capfd.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("block", blocks("sh"))
def test_lines_of_llm(block: str, address: str, place: Path) -> None:
    """Each line runs; those that are asked for the middle of the picture say it."""
    (yaml,) = re.findall(r"^```yaml\n(.*?)^```", PAGES[0].read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (place / "extra-openai-models.yaml").write_text(yaml.replace(WRITTEN, address), "utf-8")
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "llm"
        if arguments[0] == "install":
            continue
        result = CliRunner().invoke(
            cli, arguments, input="Hello.\nexit\n" if arguments[0] == "chat" else None
        )
        assert result.exit_code == 0, result.output
        if arguments[-1] == "What is at the center?" and "briefly" not in arguments:
            assert result.output.strip() == "a blue square"

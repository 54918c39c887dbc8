"""The plugin of simonw/llm: its own command line and its own API, with the demo model; `make clients` installs llm."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pocketllava import Llava, Message
from pocketllava.models.store import Store
from pocketllava.names import open_bundle

llm = pytest.importorskip("llm", reason="the plugin needs llm: make clients")

from llm.cli import cli  # noqa: E402

from pocketllava.integrations import llm as plugin  # noqa: E402

# llguidance calls a deprecated name of llama_cpp; click and pydantic warn of what llm calls.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default::DeprecationWarning")]

SCENE = str(Path(__file__).parents[1] / "examples" / "scene.png")
QUESTION, SECOND = "What is at the center?", "How many objects are there?"
Run = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def models() -> Iterator[dict[str, Llava]]:
    """What the plugin keeps loaded."""
    yield plugin.loaded
    for model in plugin.loaded.values():
        model.close()
    plugin.loaded.clear()


@pytest.fixture(scope="module")
def answers() -> tuple[str, str]:
    """What Llava says to both questions, one after the other."""
    with Llava.load("demo") as llava:
        turns = [Message("user", QUESTION, SCENE)]
        first = llava.chat(turns).text
        turns += [Message("assistant", first), Message("user", SECOND)]
        return first, llava.chat(turns).text


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run(*words) -> what `llm` prints; its logs, aliases and templates are the test's own."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))

    def run(*words: str, typed: str | None = None, code: int = 0) -> str:
        result = CliRunner().invoke(cli, words, input=typed)
        assert result.exit_code == code, result.output
        return result.output

    return run


def test_models_lists_it(run: Run) -> None:
    listed = run("models", "list", "--options", "-q", "demo")
    assert "PocketLlava: demo" in listed
    assert "temperature: float" in listed
    assert "image/jpeg" in listed
    assert {"schemas", "streaming", "async"} <= set(listed.replace("- ", "").split())
    assert "demo" in run("models", "list", "--async", "-q", "demo")


@pytest.mark.parametrize("words", [[], ["--no-stream"], ["--async"]])
def test_a_picture_and_its_question(run: Run, answers: tuple[str, str], words: list[str]) -> None:
    assert run("-m", "demo", "-a", SCENE, QUESTION, *words).strip() == answers[0]
    assert run("-c", SECOND, *words).strip() == answers[1]


def test_the_log_has_its_figures(run: Run) -> None:
    run("-m", "demo", "-a", SCENE, QUESTION)
    (log,) = json.loads(run("logs", "--json"))
    assert log["input_tokens"] > 36
    assert log["output_tokens"] > 0
    assert json.loads(log["token_details"])["image"] == 36
    assert log["response_json"]["finish_reason"] == "stop"
    assert log["response_json"]["timings"]["prompt_tokens"] == log["input_tokens"]


def test_a_template_with_a_system_prompt(run: Run) -> None:
    run("-m", "demo", "--system", "You look at pictures.", "-o", "max_tokens", "4", "--save", "look")
    with Llava.load("demo") as llava:
        expected = llava.ask(SCENE, QUESTION, system="You look at pictures.", max_tokens=4).text
    assert run("-t", "look", "-a", SCENE, QUESTION).strip() == expected.strip()


def test_a_schema(run: Run) -> None:
    given = ["-m", "demo", "-a", SCENE, "-o", "max_tokens", "64", QUESTION]
    assert list(json.loads(run(*given, "--schema", "sure bool, n int"))) == ["sure", "n"]
    assert list(json.loads(run(*given, "--schema", "sure bool", "--async"))) == ["sure"]


def test_a_chat_asks_one_loaded_model(
    run: Run, answers: tuple[str, str], models: dict[str, Llava], tmp_path: Path
) -> None:
    run("-m", "demo", "-a", SCENE, QUESTION)
    before = models["demo"]
    said = run("chat", "-c", typed=f"{SECOND}\n{QUESTION}\nexit\n")
    assert answers[1] in said
    assert models == {"demo": before}


def test_from_python(answers: tuple[str, str]) -> None:
    attachments = [llm.Attachment(content=Path(SCENE).read_bytes())]
    conversation = llm.get_model("demo").conversation()
    assert conversation.prompt(QUESTION, attachments=attachments).text() == answers[0]
    response = conversation.prompt(SECOND)
    assert response.text() == answers[1]
    assert response.usage().details["cached"] > 36

    async def ask() -> list[str]:
        model = llm.get_async_model("demo")
        return [text async for text in model.prompt(QUESTION, attachments=attachments)]

    pieces = asyncio.run(ask())
    assert len(pieces) > 1
    assert "".join(pieces) == answers[0]


def test_models_of_the_store(
    run: Run, answers: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is `llava` as well; a store that cannot be read ends no command of llm."""
    monkeypatch.setenv("POCKETLLAVA_HOME", str(tmp_path / "store"))
    with Store.default().create("llava-1.5-7b:q4_k_m") as folder:
        shutil.copytree(open_bundle("demo").folder, folder, dirs_exist_ok=True)
    assert "PocketLlava: llava-1.5-7b:q4_k_m (aliases: llava)" in run("models")
    assert run("-m", "llava", "-a", SCENE, QUESTION).strip() == answers[0]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POCKETLLAVA_HOME", str(tmp_path / "file"))
    assert "PocketLlava: demo" in run("models")


def test_a_reader_that_leaves_frees_the_model(answers: tuple[str, str]) -> None:
    model = llm.get_model("demo")
    pieces = iter(model.prompt("Describe the image.", attachments=[llm.Attachment(path=SCENE)]))
    next(pieces)
    pieces.close()
    assert model.prompt(QUESTION, attachments=[llm.Attachment(path=SCENE)]).text() == answers[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "temperature", "-3", "Hello."], "greater than or equal to 0"),
        (["-o", "color", "red", "Hello."], "Extra inputs are not permitted"),
        (["-o", "stop", "", "Hello."], "stop: found ''"),
        (["--at", __file__, "image/png", "Hello."], "not an image"),
        (["--schema", '{"not": {}}', "Hello."], "'not' is not supported"),
        (["Hello. " * 3000], "context"),
    ],
)
def test_a_refusal_is_one_line(run: Run, words: list[str], message: str) -> None:
    said = run("-m", "demo", *words, code=1)
    assert message in said
    assert "Traceback" not in said


def test_nothing_is_fetched_and_no_tool_is_called() -> None:
    model = llm.get_model("demo")
    address = llm.Attachment(url="http://127.0.0.1:1/x.png", type="image/png")
    with pytest.raises(llm.ModelError, match="nothing is fetched"):
        model.prompt("What is it?", attachments=[address]).text()
    call = llm.ToolResult(name="x", output="y", tool_call_id="1")
    with pytest.raises(llm.ModelError, match="tools: LLaVA was not trained"):
        model.prompt("What is it?", tool_results=[call]).text()


def test_listing_models_imports_no_engine() -> None:
    """llm lists models for many of its commands."""
    lines = [
        "import llm, sys",
        "assert 'demo' in {m.model.model_id for m in llm.get_models_with_aliases()}",
        "assert not {'llama_cpp', 'pocketllava.llava', 'PIL'} & set(sys.modules)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_its_command_ends_without_a_word_more(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llm", "-m", "demo", "-a", SCENE, QUESTION]
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    said = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("a blue square\n", "")


def test_without_llm_nothing_of_it_is_imported() -> None:
    code = "import sys; sys.modules['llm'] = None; import pocketllava; pocketllava.Llava.load; print('fine')"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.split() == [
        b"fine"
    ]

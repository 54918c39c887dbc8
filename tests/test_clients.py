"""Real clients against `pocketllava serve demo`: each asks about a picture, streams, and parses a schema where it can.

Every text is that of Llava.ask. `make clients` installs the libraries. Nothing but loopback is connected to.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import QUESTION, SCENE, SECOND, serving

from pocketllava import Llava

MISSING = "real clients: make clients"
openai = pytest.importorskip("openai", reason=MISSING)
pydantic = pytest.importorskip("pydantic", reason=MISSING)

# What the clients' own code warns of is theirs to mend.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

DATA = SCENE.read_bytes()
URI = f"data:image/png;base64,{base64.b64encode(DATA).decode()}"
TEXT = {"type": "text", "text": QUESTION}
IMAGE = {"type": "image_url", "image_url": {"url": URI, "detail": "low"}}
ORDERS = pytest.mark.parametrize("content", [[TEXT, IMAGE], [IMAGE, TEXT]], ids=["text first", "image first"])
USER = [{"role": "user", "content": [TEXT, IMAGE]}]
SHORT = 64  # tokens, enough for the schema's answer
LOOPBACK = ("127.0.0.1", "localhost", "::1")
BUILD = Path(__file__).parents[1] / "build" / "clients"
NODE = shutil.which("node")
OFFLINE = {
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else its import asks for a list of prices
    "LANGSMITH_TRACING": "false",
    "NO_PROXY": "127.0.0.1",
}


class Sight(pydantic.BaseModel):  # type: ignore[misc,name-defined]
    """What clients parse an answer to."""

    red: bool
    count: int = pydantic.Field(ge=0, le=9)


_is_guarded = False


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: raises for every connection that leaves this machine."""
    if not _is_guarded or event not in ("socket.connect", "socket.getaddrinfo"):
        return
    host = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
    if isinstance(host, tuple):
        host = host[0]
    if host is not None and not str(host).startswith("/") and host not in LOOPBACK:
        raise OSError(f"{event}: {host!r} is not this machine")


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_to_collect() -> Iterator[None]:
    """Sockets that a client leaves open go here, where their warnings are ignored, not amid another file's test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def loopback_only() -> Iterator[None]:
    """Nothing else is connected to, whatever a client would like."""
    global _is_guarded
    sys.addaudithook(_guard)
    before = dict(os.environ)
    os.environ.update(OFFLINE)
    _is_guarded = True
    yield
    _is_guarded = False
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The server's."""
    with serving() as address:
        yield address


@pytest.fixture(scope="module")
def answer() -> str:
    """What Llava.ask says."""
    with Llava.load("demo") as llava:
        return llava.ask(SCENE, QUESTION).text


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    """openai's."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@ORDERS
def test_openai(client: Any, answer: str, content: Any) -> None:
    reply = client.chat.completions.create(model="llava", messages=[{"role": "user", "content": content}])
    assert reply.choices[0].message.content == answer
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens_details.image_tokens == 36


@ORDERS
def test_openai_streams(client: Any, answer: str, content: Any) -> None:
    stream = client.chat.completions.create(
        model="llava",
        messages=[{"role": "user", "content": content}],
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    with client.chat.completions.stream(model="llava", messages=USER) as events:
        assert events.get_final_completion().choices[0].message.content == answer


def test_openai_parses(client: Any) -> None:
    reply = client.chat.completions.parse(
        model="llava", messages=USER, response_format=Sight, max_tokens=SHORT
    )
    assert isinstance(reply.choices[0].message.parsed, Sight)
    with client.chat.completions.stream(model="llava", messages=USER, response_format=Sight) as events:
        assert isinstance(events.get_final_completion().choices[0].message.parsed, Sight)


def test_openai_calls_a_forced_function(client: Any) -> None:
    tool = openai.pydantic_function_tool(Sight, name="look")
    choice = {"type": "function", "function": {"name": "look"}}
    reply = client.chat.completions.parse(
        model="llava", messages=USER, tools=[tool], tool_choice=choice, max_tokens=SHORT
    )
    (call,) = reply.choices[0].message.tool_calls
    assert call.function.name == "look"
    assert isinstance(call.function.parsed_arguments, Sight)
    with client.chat.completions.stream(
        model="llava", messages=USER, tools=[tool], tool_choice=choice
    ) as events:
        (call,) = events.get_final_completion().choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Sight)


def test_openai_async(address: str, answer: str) -> None:
    async def ask() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            return await client.chat.completions.create(
                model="llava", messages=USER, logprobs=True, top_logprobs=3
            )

    (choice,) = asyncio.run(ask()).choices
    assert choice.message.content == answer
    assert "".join(token.token for token in choice.logprobs.content).strip() == answer
    assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def test_openai_is_refused_in_its_own_errors(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("llava").id == "demo"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=USER)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="llava", messages=[{"role": "user", "content": "word " * 5000}])
    assert long.value.code == "context_length_exceeded"
    broken = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
        }
    ]
    with pytest.raises(openai.APIError, match="image"):
        list(client.chat.completions.create(model="llava", messages=broken, stream=True))
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="llava", input="x")


@pytest.fixture
def run_llm(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """llm's command line, which asks the server."""
    pytest.importorskip("llm", reason=MISSING)
    from click.testing import CliRunner
    from llm.cli import cli

    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    model = {
        "model_id": "served",
        "model_name": "llava",
        "api_base": f"{address}/v1",
        "vision": True,
        "supports_schema": True,
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))

    def run(*words: str) -> str:
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.output
        return result.output.strip()

    return run


@pytest.mark.parametrize("words", [[], ["--no-stream"]])
def test_llm(run_llm: Any, answer: str, words: list[str]) -> None:
    assert run_llm("-m", "served", "-a", str(SCENE), QUESTION, *words) == answer
    assert run_llm("-c", SECOND, *words) == "4"
    (_, log) = json.loads(run_llm("logs", "--json", "-n", "2"))
    assert log["input_tokens"] > 36


def test_llm_parses(run_llm: Any) -> None:
    said = run_llm(
        "-m", "served", "-a", str(SCENE), "--schema", "red bool", QUESTION, "-o", "max_tokens", str(SHORT)
    )
    assert list(json.loads(said)) == ["red"]


@pytest.fixture(scope="module")
def chat(address: str) -> Any:
    """LangChain's."""
    langchain = pytest.importorskip("langchain_openai", reason=MISSING)
    return langchain.ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="llava")


BLOCK = {"type": "image", "base64": base64.b64encode(DATA).decode(), "mime_type": "image/png"}


@pytest.mark.parametrize("content", [[TEXT, IMAGE], [IMAGE, TEXT], [TEXT, BLOCK]])
def test_langchain(chat: Any, answer: str, content: Any) -> None:
    turns = [("system", "You look at pictures."), ("user", content)]
    assert chat.invoke(turns[1:]).content == answer
    assert chat.invoke(turns[1:]).usage_metadata["input_tokens"] > 36
    pieces = list(chat.stream(turns[1:]))
    assert "".join(piece.content for piece in pieces) == answer
    assert chat.invoke(turns).content


def test_langchain_knows_what_does_not_fit(chat: Any) -> None:
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * 5000)


def test_langchain_async(chat: Any, answer: str) -> None:
    async def ask() -> tuple[str, str]:
        whole = await chat.ainvoke([("user", [TEXT, IMAGE])])
        return whole.content, "".join(
            [piece.content async for piece in chat.astream([("user", [TEXT, IMAGE])])]
        )

    assert asyncio.run(ask()) == (answer, answer)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_parses(chat: Any, method: str) -> None:
    seen = chat.with_structured_output(Sight, method=method).invoke([("user", [TEXT, IMAGE])])
    assert isinstance(seen, Sight)
    pieces = list(chat.with_structured_output(Sight, method=method).stream([("user", [TEXT, IMAGE])]))
    assert isinstance(pieces[-1], Sight)


@pytest.fixture(scope="module")
def ollama(address: str) -> Any:
    """ollama's."""
    return pytest.importorskip("ollama", reason=MISSING).Client(host=address)


def test_ollama(ollama: Any, answer: str) -> None:
    turns = [{"role": "user", "content": QUESTION, "images": [DATA]}]
    reply = ollama.chat("llava", turns, keep_alive=-1, think=False)
    assert reply.message.content == answer
    assert (reply.done, reply.done_reason) == (True, "stop")
    assert reply.eval_count > 0
    pieces = list(ollama.chat("llava", turns, stream=True))
    assert "".join(piece.message.content for piece in pieces) == answer
    assert pieces[-1].done
    said = ollama.generate("llava:latest", QUESTION, images=[str(SCENE)], options={"temperature": 0})
    assert said.response == answer
    assert (
        "".join(piece.response for piece in ollama.generate("llava", QUESTION, images=[DATA], stream=True))
        == answer
    )


def test_ollama_parses(ollama: Any) -> None:
    turns = [{"role": "user", "content": QUESTION, "images": [DATA]}]
    said = ollama.chat("llava", turns, format=Sight.model_json_schema(), options={"num_predict": SHORT})
    assert Sight.model_validate_json(said.message.content)


def test_ollama_lists(ollama: Any) -> None:
    assert "llava:latest" in [row.model for row in ollama.list().models]
    assert "vision" in ollama.show("llava").capabilities
    assert ollama.ps().models[0].model == "demo:latest"
    assert ollama.pull("llava").status == "success"
    error = pytest.importorskip("ollama").ResponseError
    with pytest.raises(error, match="not found") as unknown:
        ollama.pull("llama3")
    assert unknown.value.status_code == 404


def test_ollama_async(address: str, answer: str) -> None:
    library = pytest.importorskip("ollama", reason=MISSING)

    async def ask() -> str:
        turns = [{"role": "user", "content": QUESTION, "images": [DATA]}]
        pieces = await library.AsyncClient(host=address).chat("llava", turns, stream=True)
        return "".join([piece.message.content async for piece in pieces])

    assert asyncio.run(ask()) == answer


@pytest.fixture(scope="module")
def litellm() -> Any:
    """litellm, without a look at its list of prices."""
    return pytest.importorskip("litellm", reason=MISSING)


@pytest.mark.parametrize(("provider", "base"), [("openai", "/v1"), ("ollama_chat", ""), ("ollama", "")])
def test_litellm(litellm: Any, address: str, answer: str, provider: str, base: str) -> None:
    given = {"model": f"{provider}/llava", "api_base": address + base, "api_key": "none", "temperature": 0}
    reply = litellm.completion(**given, messages=USER)
    assert reply.choices[0].message.content == answer
    assert reply.choices[0].finish_reason == "stop"
    pieces = list(litellm.completion(**given, messages=USER, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_litellm_parses(litellm: Any, address: str) -> None:
    given = {"model": "openai/llava", "api_base": f"{address}/v1", "api_key": "none", "messages": USER}
    reply = litellm.completion(**given, response_format=Sight, max_tokens=SHORT)
    assert Sight.model_validate_json(reply.choices[0].message.content)
    long = given | {"messages": [{"role": "user", "content": "word " * 5000}]}
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**long)


@pytest.mark.skipif(
    NODE is None or not (BUILD / "node_modules").is_dir(),
    reason=f"openai-node, ollama-js, ai: no node, or {MISSING}",
)
@pytest.mark.parametrize("library", ["openai", "ollama", "ai"])
def test_node(address: str, answer: str, library: str) -> None:
    script = Path(__file__).with_name("clients.mjs")
    shutil.copy(script, BUILD)  # node looks for its packages beside the script
    command = [str(NODE), str(BUILD / script.name), library, address, str(SCENE), QUESTION]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["texts"] == [answer] * len(found["texts"])
    assert len(found["texts"]) >= 2
    assert Sight.model_validate(found["parsed"])

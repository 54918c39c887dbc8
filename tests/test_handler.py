"""LlavaChatHandler in a program's own llama_cpp.Llama: its requests, its refusals, its life."""

from __future__ import annotations

import base64
import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pictures
import pytest

from pocketllava import (
    Bundle,
    ContextOverflow,
    InputError,
    StateError,
    UnsupportedOption,
    UnsupportedSchema,
)
from pocketllava.integrations.llama_cpp import LlavaChatHandler
from pocketllava.models.file_type import FILE_TYPE, type_name
from pocketllava.prompt.openai import from_openai

URI = "data:image/png;base64," + base64.b64encode(pictures.four()[0]).decode()
REQUEST: Any = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": URI}},
            {"type": "text", "text": "What is it?"},
        ],
    }
]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["photo", "drawing"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["kind", "n"],
}


@pytest.fixture(scope="module")
def llama(bundle: Bundle) -> Iterator[Any]:
    """A Llama with the handler; logits of every position are what llama_cpp's logprobs need."""
    from llama_cpp import Llama

    handler = LlavaChatHandler(bundle.folder)
    llama = Llama(
        str(bundle.model), chat_handler=handler, n_ctx=1024, n_threads=1, logits_all=True, verbose=False
    )
    yield llama
    handler.close()
    llama.close()


def answer(llama: Any, **options: Any) -> Any:
    return llama.create_chat_completion(REQUEST, max_tokens=12, temperature=0.0, **options)["choices"][0]


def test_log_probabilities(llama: Any) -> None:
    plain, choice = answer(llama), answer(llama, logprobs=True, top_logprobs=2)
    assert choice["message"] == plain["message"]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == 12
    for token in tokens:
        assert 1 <= len(token["top_logprobs"]) <= 2  # llama_cpp merges those of equal text
        assert math.isclose(token["logprob"], max(t["logprob"] for t in token["top_logprobs"]), abs_tol=1e-4)
        assert token["logprob"] <= 0


def test_json_objects(llama: Any) -> None:
    """The answer keeps to JSON's grammar: it parses, or was cut off within an object."""
    text = answer(llama, response_format={"type": "json_object"})["message"]["content"]
    assert text.lstrip().startswith("{")
    assert answer(llama, response_format={"type": "text"}) == answer(llama)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_schemas(llama: Any, kind: str, stream: bool) -> None:
    form = {"schema": SCHEMA} if kind == "json_object" else {"json_schema": {"name": "a", "schema": SCHEMA}}
    options: Any = {"response_format": {"type": kind, **form}, "max_tokens": 60, "temperature": 0.0}
    found = llama.create_chat_completion(REQUEST, stream=stream, **options)
    choices = [part["choices"][0] for part in (found if stream else [found])]
    text = "".join(c.get("delta", c.get("message")).get("content", "") for c in choices)
    jsonschema.validate(json.loads(text), SCHEMA)
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"grammar": 'root ::= "a"'}, "grammar"),
        ({"response_format": {"type": "json_object", "schema": {"enum": []}}}, "schema: enum"),
        ({"response_format": {"type": "json_object", "schema": {"not": {}}}}, "schema: keyword 'not'"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_what_is_refused(llama: Any, options: dict[str, Any], name: str) -> None:
    with pytest.raises((UnsupportedOption, UnsupportedSchema), match=f"^{name}[: ]"):
        answer(llama, **options)
    assert answer(llama)["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("of", "own", "exact"),
    [("F16", "F16", True), ("F16", "Q8_0", False), (None, "F16", True), (None, "Q8_0", False)],
)
def test_the_text_model_says_whether_tokens_are_promised(
    make_bundle: Any, tmp_path: Path, of: str | None, own: str, exact: bool
) -> None:
    """Its own file does: the mmproj may stand alone, or belong to a bundle of another type."""
    from llama_cpp import Llama

    bundle = make_bundle(of or own, "F16")
    mmproj = bundle.mmproj if of else shutil.copy(bundle.mmproj, tmp_path / "mmproj.gguf")
    handler = LlavaChatHandler(mmproj)
    llama: Any = Llama(
        str(make_bundle(own, "F16").model), chat_handler=handler, n_ctx=256, n_threads=1, verbose=False
    )
    assert handler.session(llama).is_exact == exact
    llama.close()


@pytest.mark.parametrize("value", [None, "", "x", -1, 1 << 31, math.inf, math.nan, [1], {}])
def test_a_type_that_no_file_has_is_unknown(value: Any) -> None:
    assert type_name({FILE_TYPE: value}) == type_name({}) == "unknown"


def test_a_prompt_that_ends_in_an_image(make_bundle: Any, tmp_path: Any) -> None:
    """A template without a generation prompt: there are no logits to sample from, and llama.cpp would abort."""
    from llama_cpp import Llama

    bundle = make_bundle()
    (tmp_path / "model.gguf").write_bytes(bundle.model.read_bytes())
    (tmp_path / "mmproj.gguf").write_bytes(bundle.mmproj.read_bytes())
    manifest = json.loads((bundle.folder / "bundle.json").read_text("utf-8"))
    manifest["chat_template"] = (
        "{% for m in messages %}{{ m.content[-1].text }}{% for p in m.content[:-1] %}<image>{% endfor %}{% endfor %}"
    )
    (tmp_path / "bundle.json").write_text(json.dumps(manifest), "utf-8")
    llama = Llama(
        str(bundle.model), chat_handler=LlavaChatHandler(tmp_path), n_ctx=1024, n_threads=1, verbose=False
    )
    with pytest.raises(InputError, match="the prompt ends in an image, expected text"):
        llama.create_chat_completion(REQUEST, max_tokens=1)
    llama.close()


def test_a_context_that_is_no_multiple_of_256(bundle: Bundle) -> None:
    from llama_cpp import Llama

    handler = LlavaChatHandler(bundle.folder)
    llama: Any = Llama(str(bundle.model), chat_handler=handler, n_ctx=600, n_threads=1, verbose=False)
    long: Any = [{"role": "system", "content": "word " * 20}, *REQUEST]
    needed = handler.session(llama).count_tokens([from_openai(message) for message in long])
    assert 600 < needed < 768  # llama.cpp's own context is rounded up, llama_cpp's buffers are not
    with pytest.raises(ContextOverflow, match="do not fit a context of 600"):
        llama.create_chat_completion(long, max_tokens=1)
    assert llama.create_chat_completion(REQUEST, max_tokens=2, temperature=0.0)["choices"]
    llama.close()


def test_a_llama_without_close_is_freed(bundle: Bundle) -> None:
    """The Llama holds its handler; the handler does not keep it alive."""
    from llama_cpp import Llama

    llama: Any = Llama(
        str(bundle.model),
        chat_handler=LlavaChatHandler(bundle.folder),
        n_ctx=1024,
        n_threads=1,
        verbose=False,
    )
    llama.create_chat_completion(REQUEST, max_tokens=1)
    gone = weakref.ref(llama)
    del llama
    gc.collect()
    assert gone() is None


LATE: dict[str, Callable[[Any, Any], Any]] = {
    "__call__": lambda handler, llama: handler(llama=llama, messages=REQUEST, max_tokens=1),
    "session": lambda handler, llama: handler.session(llama),
}


@pytest.mark.parametrize("closed", ["handler", "Llama"])
@pytest.mark.parametrize("used", [False, True])
def test_after_close_every_member_is_a_state_error(bundle: Bundle, closed: str, used: bool) -> None:
    from llama_cpp import Llama

    public = {n for n, member in vars(LlavaChatHandler).items() if callable(member) and not n.startswith("_")}
    assert public - {"close"} | {"__call__"} == set(LATE)  # load_image is llama_cpp's; it needs no model
    handler = LlavaChatHandler(bundle.folder)
    llama: Any = Llama(str(bundle.model), chat_handler=handler, n_ctx=1024, n_threads=1, verbose=False)
    if used:
        llama.create_chat_completion(REQUEST, max_tokens=1)
    for _ in range(2):
        (handler if closed == "handler" else llama).close()
    for call in (*LATE.values(), lambda _, llama: llama.create_chat_completion(REQUEST, max_tokens=1)):
        with pytest.raises(StateError, match=rf"^{closed}: used after close\(\); make another$"):
            call(handler, llama)
    handler.close()
    llama.close()


def test_options_of_the_llama_are_not_the_handlers(bundle: Bundle) -> None:
    with pytest.raises(
        UnsupportedOption, match=r"^n_ctx: expected one of max_pixels, .* llama_cpp\.Llama's own"
    ):
        LlavaChatHandler(bundle.folder, n_ctx=512)
    with pytest.raises(UnsupportedOption, match=r"^keep_prefixes: "):
        LlavaChatHandler(bundle.folder, keep_prefixes=True)


def test_the_demo_by_name() -> None:
    assert LlavaChatHandler("demo").bundle is not None

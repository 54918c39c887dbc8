"""Structured answers: JSON that fits its schema, choices with their probabilities, log probabilities."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import json_schemas
import jsonschema
import numpy as np
import pictures
import pytest
from attack.schemas import answer
from click.testing import CliRunner

from pocketllava import Answer, InputError, Llava, Message, Options, UnsupportedOption, UnsupportedSchema
from pocketllava.cli import cli
from pocketllava.engine.structured import Grammars
from pocketllava.json_schema import MAX_NUMBER, MAX_STRING, bounded
from pocketllava.measure.accuracy import normalized, scene_items

RECORD: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": "Record",
    "type": "object",
    "properties": {
        "caption": {"type": "string", "description": "What it shows.", "maxLength": 20},
        "kind": {"enum": ["photo", "drawing"]},
        "n": {"type": "integer"},
    },
    "required": ["caption", "kind", "n"],
}
ASKED = [Message("user", "Describe it.")]


def whole(found: Answer, schema: dict[str, Any]) -> Any:
    """The JSON of an answer that is not cut off."""
    assert found.finish_reason == "stop"
    value = json.loads(found.text)
    jsonschema.validate(value, schema)
    return value


@pytest.fixture(scope="module")
def demo() -> Iterator[Llava]:
    """The trained model."""
    with Llava.load("demo", n_threads=1) as model:
        yield model


@pytest.mark.parametrize("layout", [{}, {"llama3": True}], ids=["SentencePiece", "byte-level BPE"])
def test_an_answer_fits_its_schema_and_repeats_itself(make_bundle: Any, layout: dict[str, Any]) -> None:
    with Llava.load(make_bundle(**layout).folder, n_threads=1) as model:
        picture = pictures.four()[0]
        for options in ({}, {"temperature": 1.5, "seed": 7}, {"temperature": 1.0, "top_p": 0.9, "seed": 8}):
            first = model.ask(picture, "What is it?", schema=RECORD, **options)
            value = whole(first, RECORD)
            assert list(value) == ["caption", "kind", "n"]
            assert json.dumps(value, separators=(",", ":"), ensure_ascii=False) == first.text
            assert model.ask(picture, "What is it?", schema=RECORD, **options).token_ids == first.token_ids
        texts = {model.chat(ASKED, schema=RECORD, temperature=1.5, seed=n).text for n in range(3)}
        assert len(texts) > 1


def test_forced_tokens_in_one_batch_change_nothing(demo: Llava) -> None:
    """With log probabilities each token is evaluated by itself."""
    together = demo.chat(ASKED, schema=RECORD)
    alone = demo.chat(ASKED, schema=RECORD, top_logprobs=0)
    assert (alone.text, alone.token_ids) == (together.text, together.token_ids)
    assert len(alone.logprobs) == len(alone.token_ids)
    assert b"".join(entry.bytes for entry in alone.logprobs).decode().removeprefix(" ") == alone.text


def test_the_space_before_the_first_word_is_not_forced_away(demo: Llava) -> None:
    """A SentencePiece model's first piece begins with a space; without one it would start where it was never trained."""
    with demo.session() as session:
        text = session.text
        allowed = Grammars(text).constraint({"type": "object"}).allowed()
        assert {text.vocabulary.piece(int(i))[:1] for i in allowed} == {b" ", b"{"}
    assert demo.chat(ASKED, schema={"enum": ["red"]}).text == '"red"'


def test_random_schemas(llava: Llava) -> None:
    """A few of the campaign's (tests/attack/schemas.py)."""
    endings = []
    with llava.session() as session:
        grammars = Grammars(session.text)
        for seed in range(150):
            schema = json_schemas.schema(random.Random(seed))
            try:
                found = answer(session.text, grammars, schema, seed)
            except UnsupportedSchema:
                endings.append("refused")
                continue
            if found is not None:
                json_schemas.validate(found, schema)
            endings.append("cut off" if found is None else "valid")
    assert endings.count("valid") >= 100


def test_recursion(llava: Llava) -> None:
    schema = json_schemas.recursive()
    found = llava.chat(ASKED, schema=schema, max_tokens=300, temperature=1.0, seed=3)
    if found.finish_reason == "stop":
        whole(found, schema)
    assert found.text.startswith('{"name":"')


HOSTILE = """
import json_schemas
from pocketllava import InputError, Llava, Options
with Llava.load("demo", n_threads=1) as llava:
    for name, schema in json_schemas.HOSTILE.items():
        try:
            ending = llava.ask(None, "?", schema=schema, max_tokens=40).finish_reason
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) <= 1000, error
            ending = "refused"
        print(name, ending, sep=": ")
"""


def test_hostile_schemas_end_no_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE], capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
        timeout=60,
    )  # fmt: skip
    endings = dict(line.split(": ") for line in done.stdout.splitlines())
    assert (done.returncode, set(endings)) == (0, set(json_schemas.HOSTILE)), done.stderr
    assert set(endings.values()) == {"refused", "length", "stop"}
    for name in ("empty enum", "remote reference", "reference to itself", "900 patterns", "3,000 deep"):
        assert endings[name] == "refused", name


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, r"schema: keyword 'not' is not supported; leave it out"),
        (
            {"type": "object", "properties": {"a": {"maxLenght": 5}}},
            r"schema\.properties\.a: .*mean 'maxLength'\?",
        ),
        ({"items": {"uniqueItems": True}}, r"schema\.items: keyword 'uniqueItems'"),
        ({"anyOf": [{}, {"if": {}}]}, r"schema\.anyOf\[1\]: keyword 'if'"),
        ({"x-guidance": {"lenient": True}}, "schema: keyword 'x-guidance'"),
        ({"$ref": "https://a.example/b.json"}, r"schema: \$ref: found 'https.* are not fetched"),
        ({"$ref": "other.json#/a"}, r"schema: \$ref"),
        ({"type": "text"}, "schema: type: found 'text', expected one or several of"),
        ({"type": ["string", 5]}, "schema: type"),
        ({"items": [{}]}, "schema: items: found list.*prefixItems"),
        ({"properties": {"a": 1}}, r"schema\.properties\.a: found int, expected a schema"),
        ({"required": "a"}, "schema: required"),
        ({"minLength": -1}, "schema: minLength: found -1"),
        ({"exclusiveMinimum": True}, "schema: exclusiveMinimum: found True, expected a number"),
        ({"enum": list(range(1001))}, "schema: enum: found 1001 in all, expected at most 1000"),
        ({"minProperties": 2}, "schema: minProperties: found 2"),
        ({"description": "a" * 70_000}, "schema: found 700.. bytes, expected at most 65536"),
        ({"const": math.nan}, "schema: not JSON"),
        ({"const": {1, 2}}, "schema: not JSON"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedSchema, match=f"^{message}"):
        Options(schema=schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "format": "color"}, "Unknown format: color; leave it out"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf: .*; use anyOf"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, r"minimum \(3\) is greater than maximum \(1\)"),
        ({"$ref": "#"}, "no JSON fits it"),
        ({"$ref": "#/$defs/gone"}, r"Pointer '/\$defs/gone' does not exist"),
    ],
)
def test_what_llguidance_refuses_is_refused_before_the_prompt(
    llava: Llava, schema: Any, message: str
) -> None:
    with pytest.raises(UnsupportedSchema, match=f"^schema: .*{message}") as caught:
        llava.chat(ASKED, schema=schema)
    assert "start:" not in str(caught.value)


def test_what_was_open_is_bounded() -> None:
    found = bounded(Options(schema=RECORD).schema)  # type: ignore[arg-type]
    assert found == {
        "type": "object",
        "properties": {
            "caption": {"type": "string", "maxLength": 20},
            "kind": {"enum": ["photo", "drawing"]},
            "n": {"type": "integer", "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER},
        },
        "required": ["caption", "kind", "n"],
        "additionalProperties": False,
    }
    assert bounded({"type": "string"}) == {"type": "string", "maxLength": MAX_STRING}
    assert bounded({"type": "string", "minLength": 2000})["maxLength"] == 2000
    assert bounded({"type": "number", "minimum": 0, "maximum": 1})["multipleOf"] == 1e-6
    assert "multipleOf" not in bounded({"type": "number", "minimum": 1e-9})
    joined = {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    assert "additionalProperties" not in json.dumps(bounded(joined))
    assert "maxLength" in json.dumps(bounded({"type": "object"}))


def test_max_tokens_cuts_json_and_says_so(llava: Llava) -> None:
    full = llava.chat(ASKED, schema=RECORD)
    n = len(full.token_ids)
    cut = llava.chat(ASKED, schema=RECORD, max_tokens=n - 1)
    assert (cut.finish_reason, cut.token_ids) == ("length", full.token_ids[: n - 1])
    exactly = llava.chat(ASKED, schema=RECORD, max_tokens=n)
    assert (exactly.finish_reason, exactly.text) == ("stop", full.text)
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.text)


def test_stop_texts_do_not_break_json(llava: Llava) -> None:
    full = llava.chat(ASKED, schema=RECORD)
    assert llava.chat(ASKED, schema=RECORD, stop=(full.text[5:8], "}")).text == full.text


@pytest.mark.parametrize("options", [{"schema": RECORD}, {"choices": ("yes", "no, it is not", "maybe so")}])
def test_stopping(llava: Llava, options: dict[str, Any]) -> None:
    picture = pictures.four()[0]
    expected = llava.ask(picture, "Is it red?", **options)
    asked = 0

    def soon() -> bool:
        nonlocal asked
        asked += 1
        return asked > limit

    turns = [Message("user", "Is it red?", picture)]
    for limit in (0, 3, 40):  # in the prompt, in the answer
        asked = 0
        chunks = list(llava.stream(turns, should_stop=soon, **options))
        assert chunks[-1].finish_reason in ("cancelled", expected.finish_reason)
        assert chunks[-1].finish_reason == "cancelled" or limit == 40
    again = llava.ask(picture, "Is it red?", **options)
    assert (again.text, again.choices == expected.choices) == (expected.text, True)


@pytest.mark.parametrize("options", [{"schema": {"enum": ["red", "blue"]}}, {"choices": ("red", "blue sky")}])
def test_the_next_turn_evaluates_what_is_new(demo: Llava, options: dict[str, Any]) -> None:
    picture = Path(__file__).parents[1] / "examples" / "scene.png"
    first = [Message("user", "What color is it?", picture)]
    found = demo.chat(first, **options)
    turns = [*first, Message("assistant", found.text), Message("user", "And what else?")]
    second = demo.chat(turns, max_tokens=4)
    assert second.timings.cached_tokens >= found.timings.prompt_tokens
    assert second.timings.encode_s < 0.001
    demo.clear_cache()
    assert demo.chat(turns, max_tokens=4).text == second.text
    assert demo.chat(first, **options).text == found.text


def test_free_answers_are_what_they_were(llava: Llava) -> None:
    """Before and after structured ones, and beside log probabilities."""
    picture = pictures.four()[1]
    llava.clear_cache()
    plain = llava.ask(picture, "What is it?", max_tokens=12)
    llava.ask(picture, "What is it?", schema=RECORD)
    llava.ask(picture, "What is it?", choices=["a circle", "a square"])
    measured = llava.ask(picture, "What is it?", max_tokens=12, top_logprobs=3)
    assert plain.token_ids == measured.token_ids == llava.ask(picture, "What is it?", max_tokens=12).token_ids
    assert not plain.logprobs
    for entry in measured.logprobs:  # greedy: the likeliest, and the first of the listed
        assert [entry.token, entry.logprob, entry.bytes] == list(entry.top[0])
        assert len(entry.top) == 3
        assert sum(math.exp(logprob) for _, logprob, _ in entry.top) <= 1
    chunks = list(llava.stream([Message("user", "What is it?", picture)], max_tokens=12, top_logprobs=3))
    assert [entry for chunk in chunks for entry in chunk.logprobs] == list(measured.logprobs)


def test_penalties(llava: Llava) -> None:
    def repeated(**options: Any) -> float:
        ids = llava.chat(ASKED, max_tokens=60, temperature=0.3, seed=5, **options).token_ids
        return len(set(ids)) / len(ids)

    assert repeated(presence_penalty=2.0) > repeated()
    assert repeated(frequency_penalty=2.0) > repeated()


def full_logits(llava: Llava, ids: list[int]) -> Any:
    """Log probabilities of the token after each position, (len(ids), n_vocab), by a Llama of its own."""
    from llama_cpp import Llama

    model = Llama(str(llava.bundle.model), n_ctx=512, logits_all=True, n_threads=1, verbose=False)
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)], dtype=np.float64)
    model.close()
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


@pytest.mark.parametrize("layout", [{}, {"llama3": True}], ids=["SentencePiece", "byte-level BPE"])
def test_choices_are_scored_as_the_models_own_logits_say(make_bundle: Any, layout: dict[str, Any]) -> None:
    """Each spelling evaluated whole, from the prompt's first token on."""
    choices = ("yes", "no", "a red circle", "a red", "A red circle on white")
    with Llava.load(make_bundle(**layout).folder, n_threads=1, n_ctx=512) as model:
        found = model.chat(ASKED, choices=choices)
        with model.session() as session:
            prompt = [item for item in session.count(ASKED) if isinstance(item, int)]
            newline = session.text.tokenize("\n")
            shares: dict[tuple[int, ...], float] = {}
            owner = {}
            for choice, space in itertools.product(choices, ("", " ")):
                for spelled in {choice, choice[0].swapcase() + choice[1:]}:
                    if spelled == choice or spelled not in choices:
                        ids = tuple(session.text.tokenize(f"\n{space}{spelled}")[len(newline) :])
                        owner[ids] = choice
                        rows = full_logits(model, [*prompt, *ids])[len(prompt) - 1 :]
                        shares[ids] = math.exp(sum(row[i] for row, i in zip(rows, ids, strict=False)))
    sums = dict.fromkeys(choices, 0.0)
    for ids, choice in owner.items():
        longer = {o for o in shares if o != ids and o[: len(ids)] == ids}
        longer -= {o for o in longer for p in longer if p != o and o[: len(p)] == p}
        sums[choice] += max(0.0, shares[ids] - sum(shares[o] for o in longer))
    expected = {choice: share / sum(sums.values()) for choice, share in sums.items()}
    probabilities = {choice.text: choice.probability for choice in found.choices}
    assert probabilities == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert sum(probabilities.values()) == pytest.approx(1)
    ranked = [choice.probability for choice in found.choices]
    assert ranked == sorted(ranked, reverse=True)
    assert found.text == found.choices[0].text
    assert found.margin == pytest.approx(ranked[0] - ranked[1])


def test_choices_agree_with_free_answers(demo: Llava) -> None:
    """On held-out scenes: yes or no, and the free answers among each other."""
    items = [item for item in scene_items(280) if item.answers[0] in ("yes", "no")][:30]
    assert len(items) == 30
    free = [normalized(demo.chat(item.messages, max_tokens=8).text) for item in items]
    chosen = [demo.chat(item.messages, choices=("yes", "no")) for item in items]
    assert [answer.text for answer in chosen] == free
    right = [
        answer.margin for answer, item in zip(chosen, items, strict=True) if answer.text == item.answers[0]
    ]
    assert len(right) >= 28
    assert sorted(m for m in right if m is not None)[len(right) // 2] > 0.9


def test_choices_of_colors_are_right(demo: Llava) -> None:
    colors = ("red", "green", "blue", "yellow", "purple", "orange")
    items = [item for item in scene_items(200) if item.answers[0] in colors][:12]
    chosen = [demo.chat(item.messages, choices=colors).text for item in items]
    assert len(items) == 12
    assert chosen == [item.answers[0] for item in items]


def test_one_choice_and_margins() -> None:
    with Llava.load("demo", n_threads=1) as model:
        only = model.chat(ASKED, choices=["so"])
        assert (only.text, only.margin, [c.probability for c in only.choices]) == ("so", 1.0, [1.0])
        assert model.chat(ASKED, max_tokens=1).margin is None
        for other in ({"schema": RECORD}, {"top_logprobs": 1}):
            with pytest.raises(InputError, match="found with choices"):
                model.chat(ASKED, choices=["a", "b"], **other)


def test_the_command_line(here: Path) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["ask", "demo", "b.PNG", "Is it red?", "-t", "1", *arguments])

    (here / "record.json").write_text(json.dumps(RECORD), "utf-8-sig")
    done = run("--schema", "record.json")
    assert (done.exit_code, "warning" in done.stderr) == (0, False)
    jsonschema.validate(json.loads(done.stdout), RECORD)
    for arguments in ((), ("--json",)):
        cut = run("--schema", "record.json", "-n", "6", *arguments)
        assert "warning: the answer is cut off, so it is not whole JSON" in " ".join(cut.stderr.split())
    done = run("--choices", "yes, no", "--json")
    fields = json.loads(done.stdout)
    assert sorted(c["text"] for c in fields["choices"]) == ["no", "yes"]
    assert 0 <= fields["margin"] <= 1
    done = run("--choices", "yes,no")
    assert done.stdout.strip() == fields["text"]
    assert done.stderr.startswith(f"choices: {fields['text']} ")
    assert not run("--choices", "yes,no", "--quiet").stderr
    entry = json.loads(run("--json", "--top-logprobs", "2", "-n", "1").stdout)["logprobs"][0]
    assert bytes(entry["bytes"]).decode() == entry["token"] == entry["top_logprobs"][0]["token"]
    assert len(entry["top_logprobs"]) == 2


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--schema", "gone.json"], 1, "error: gone.json: cannot be read as a JSON schema (No such file"),
        (["--schema", "text.json"], 1, "error: text.json: cannot be read as a JSON schema (Expecting value"),
        (["--schema", "list.json"], 2, "found JSON of type list, expected an object"),
        (["--schema", "not.json"], 1, "error: schema: keyword 'not' is not supported"),
        (["--schema", "record.json", "--choices", "a,b"], 2, "--schema and --choices exclude each other"),
        (["--schema", "record.json", "--stop", "a"], 2, "--stop does nothing with --schema"),
        (["--choices", "a,b", "--seed", "1"], 2, "--seed does nothing with --choices"),
        (["--choices", "a,,b"], 2, "expected a sequence of different texts"),
        (["--top-logprobs", "3"], 2, "--top-logprobs does nothing without --json"),
    ],
)
def test_wrong_usage(here: Path, arguments: list[str], exit_code: int, message: str) -> None:
    for name, text in {"text": "a", "list": "[]", "not": '{"not": {}}', "record": json.dumps(RECORD)}.items():
        (here / f"{name}.json").write_text(text)
    program = [sys.executable, "-m", "pocketllava", "ask", "demo", "Is it?", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == exit_code, done.stderr
    assert message in done.stderr


def test_without_the_extra_one_line_names_it(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance.llamacpp", None)
    with (
        llava.session() as session,
        pytest.raises(UnsupportedOption, match=r'pip install "pocketllava\[structured\]"'),
    ):
        Grammars(session.text)
    assert llava.chat(ASKED, choices=["yes", "no"]).choices  # these need nothing

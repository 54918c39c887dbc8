"""Scoring as the field scores, runs that go on where they stopped, and files of questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pictures
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pocketllava import Answer, Bundle, InputError, Message, Options, Timings
from pocketllava.cli import cli
from pocketllava.measure.accuracy import (
    Item,
    Result,
    ResultsFile,
    exact,
    file_items,
    normalized,
    run,
    soft,
    summary,
    yes_no,
)


class Scripted:
    """Answers from a list and keeps what it was asked: the same interface as Llava."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[str]()

    def chat(self, messages: Sequence[Message], *, options: Options | None = None) -> Answer:
        """The next answer."""
        self.asked.append(messages[-1].text)
        return Answer(self.answers.pop(0), (), Timings(), "stop")


def item(n: int, answer: str, kind: str = "all") -> Item:
    """A question with one right answer."""
    return Item(str(n), kind, (Message("user", f"Question {n}?"),), (answer,))


def result(answer: str, *expected: str, kind: str = "all") -> Result:
    """A scored answer."""
    return Result("1", kind, answer, expected, exact(answer, expected), soft(answer, expected))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A red circle.", "red circle"),
        ("Two", "2"),
        ("  the   Dog ", "dog"),
        ("I can't see that.", "i can't see that"),
        ("1.5", "1.5"),
        ("yes!", "Yes"),
    ],
)
def test_normalizing(answer: str, expected: str) -> None:
    assert exact(answer, [expected]) == 1
    assert normalized(normalized(answer)) == normalized(answer)


def test_soft_match_is_vqas() -> None:
    """https://visualqa.org/evaluation.html: three of ten make an answer right."""
    ten = ["dog"] * 3 + ["cat"] * 7
    assert soft("dog", ten) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert soft("cat", ten) == 1
    assert soft("cow", ten) == 0
    assert soft("dog", ["dog"]) == 1


@given(said=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_yes_and_no_as_pope_reports(said: list[tuple[bool, bool]]) -> None:
    words = {True: "yes", False: "no"}
    found = yes_no([result(words[s], words[t]) for s, t in said])
    hits = sum(s and t for s, t in said)
    assert found["precision"] == pytest.approx(hits / max(1, sum(s for s, _ in said)), abs=1e-4)
    assert found["recall"] == pytest.approx(hits / max(1, sum(t for _, t in said)), abs=1e-4)
    assert found["accuracy"] == pytest.approx(sum(s == t for s, t in said) / len(said), abs=1e-4)
    assert found["yes"] == pytest.approx(sum(s for s, _ in said) / len(said), abs=1e-4)


def test_a_summary_counts_by_type() -> None:
    table = summary([result("a", "b", kind="x"), result("b", "b", kind="x"), result("yes", "yes", kind="y")])
    assert table["n"] == 3
    assert table["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert table["by_type"] == {"x": 0.5, "y": 1.0}
    assert table["yes_no"]["f1"] == 1


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, about = tmp_path / "results.jsonl", {"model": "m", "set": "s"}
    questions = [item(n, f"answer {n}") for n in range(4)]
    first = Scripted("answer 0", "wrong")
    file = ResultsFile(path, about)
    for _, found in zip(range(2), run(first, questions, file.done), strict=False):
        file.add(found)
    with path.open("a") as f:
        f.write('{"id": "2", "ki')  # killed in the middle of a line
    second = Scripted("answer 2", "answer 3")
    file = ResultsFile(path, about)
    results = []
    for found in run(second, questions, file.done):
        file.add(found)
        results.append(found)
    assert second.asked == ["Question 2?", "Question 3?"]
    assert [r.exact for r in results] == [1, 0, 1, 1]
    assert len(path.read_text().splitlines()) == 5
    with pytest.raises(InputError, match="holds results of another model or set"):
        ResultsFile(path, {"model": "other", "set": "s"})


def test_files_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    (tmp_path / "a.png").write_bytes(pictures.four()[0])
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "question": "What?", "answer": "dog", "type": "animals"},
        {"image": "a.png", "question": "What?", "answers": [{"answer": "dog"}] * 10, "id": 17},
        {"question": "Two plus two?", "answers": ["4", "four"]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = list(file_items(path, None))
    assert [(i.id, i.kind, len(i.answers), len(i.messages[0].images)) for i in found] == [
        ("1", "animals", 1, 1), ("17", "all", 10, 1), ("3", "all", 2, 0)
    ]  # fmt: skip
    assert len(list(file_items(path, 2))) == 2
    path.write_text('{"question": "no answer"}\n')
    with pytest.raises(InputError, match=r"line 1: found no 'answer'; expected a JSON object"):
        list(file_items(path, None))
    with pytest.raises(InputError, match="cannot be read"):
        list(file_items(tmp_path / "none.jsonl", None))


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"question": "a", "anwser": "b"}, "unknown key 'anwser', did you mean 'answer'"),
        ({"question": "a", "answers": []}, r"answers is \[\], expected at least one"),
        ({"question": "a", "answers": "yes"}, "answers is 'yes'"),
        ({"question": "a", "answers": [None]}, "answer is None, expected a text"),
        ({"question": "a", "answer": "b", "answers": ["b"]}, "both answer and answers"),
        ({"question": "  ", "answer": "b"}, "question is empty"),
        ({"question": ["a"], "answer": "b"}, "question is"),
        ({"question": "\udcff", "answer": "b"}, "surrogates not allowed"),
        ({"question": "a", "answer": "b", "image": "gone.png"}, "gone.png': No such file"),
        ({"question": "a", "answer": "b", "image": "."}, "is no regular file"),
        ({"question": "a", "answer": "b", "image": 7}, "image is 7, expected a path"),
        ({"question": "a", "answer": "b", "id": "1"}, "id '1' a second time"),
        (["question", "answer"], "found list"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_wrong_line_is_named_whatever_the_limit(tmp_path: Path, row: Any, fault: str) -> None:
    path = tmp_path / "questions.jsonl"
    good = json.dumps({"question": "a", "answer": "b"})
    path.write_text(f"{good}\n\n{row if isinstance(row, str) else json.dumps(row)}\n")
    with pytest.raises(
        InputError, match=f"questions.jsonl, line 3: .*{fault}.*; expected a JSON object with"
    ):
        file_items(path, 1)


def test_sets_as_other_programs_write_them(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    line = json.dumps({"question": "one\u2028line", "answer": 4}, ensure_ascii=False)
    for data in (line.encode("utf-8-sig"), line.encode("utf-16"), f"{line}\r\n".encode()):
        path.write_bytes(data)
        (item,) = file_items(path, None)
        assert (item.messages[0].text, item.answers) == ("one\u2028line", ("4",))
    path.write_bytes(b"\n \n")
    with pytest.raises(InputError, match="no questions; expected a JSON object"):
        file_items(path, None)


def test_answers_on_stdout_are_a_file_of_results(bundle: Bundle, tmp_path: Path) -> None:
    questions, results = tmp_path / "questions.jsonl", tmp_path / "results.jsonl"
    questions.write_text('{"question": "Is it red?", "answer": "yes"}')
    arguments = ["eval", str(bundle.folder), "--set", str(questions), "--quiet", "--results"]
    printed = CliRunner().invoke(cli, [*arguments, "-"])
    assert "of 1 right" in printed.stderr
    written = CliRunner().invoke(cli, [*arguments, str(results)])
    assert "of 1 right" in written.stdout
    assert printed.stdout == results.read_text()


def test_a_set_and_a_place_are_checked_before_the_model(bundle: Bundle, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "Is it red?", "answer": "yes"}')
    for results in (tmp_path, tmp_path / "none" / "results.jsonl", Path("/dev/full")):
        done = CliRunner().invoke(
            cli,
            ["eval", str(bundle.folder), "--set", str(questions), "--results", str(results), "-c", "9999"],
        )
        assert "cannot be written" in str(done.exception)
    results = tmp_path / "results.jsonl"
    done = CliRunner().invoke(
        cli, ["eval", str(bundle.folder), "--set", str(questions), "--results", str(results), "-c", "9999"]
    )
    assert "n_ctx: found 9999" in str(done.exception)  # and an empty file of results is not left behind
    assert list(tmp_path.iterdir()) == [questions]


def test_eval_on_the_command_line(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(pictures.four()[0])
    questions, results = tmp_path / "questions.jsonl", tmp_path / "results.jsonl"
    row = {"image": "a.png", "question": "Is it red?", "answer": "yes"}
    questions.write_text("\n".join([json.dumps(row)] * 3))
    arguments = ["eval", str(bundle.folder), "--set", str(questions), "--results", str(results), "--quiet"]
    first = CliRunner().invoke(cli, [*arguments, "--limit", "2", "--json"])
    table = json.loads(first.stdout)
    assert (table["n"], set(table["by_type"])) == (2, {"all"})
    assert {"accuracy", "precision", "recall", "f1", "yes"} == set(table["yes_no"])
    again = CliRunner().invoke(cli, arguments)
    assert "of 3 right" in again.stdout
    assert len(results.read_text().splitlines()) == 4

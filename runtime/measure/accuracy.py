"""How often a model's answers are right: questions with known answers, scored as the field scores them.

Knows scoring and the two sources of questions (drawn scenes, a JSONL file); a model is anything with Llava's chat().
Results are appended to a file line by line, so an interrupted run continues with the next question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pocketllava.errors import InputError
from pocketllava.models import Bundle
from pocketllava.models.bundle import sha256
from pocketllava.models.files import read_text
from pocketllava.types import Answer, ImageSource, Message, Options

SCENES = "scenes"
DEFAULT_SCENES = 1000
YES_NO = ("yes", "no")
VQA_ANSWERS = 3  # so many of ten annotators make an answer fully right
SHORT_ANSWER = Options(max_tokens=128)
ARTICLES = {"a", "an", "the"}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(n) for n, word in enumerate(DIGITS)}


class Model(Protocol):
    """A model that can be evaluated: Llava, or a script of answers."""

    def chat(self, messages: Sequence[Message], *, options: Options | None = None) -> Answer:
        """Answer a conversation."""


@dataclass(frozen=True)
class Item:
    """A question about an image, its right answers (ten annotators', or one), and what kind it is."""

    id: str
    kind: str
    messages: tuple[Message, ...] = field(repr=False)
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """One answer and its score: exact 0 or 1, soft 0 to 1."""

    id: str
    kind: str
    answer: str
    expected: tuple[str, ...]
    exact: float
    soft: float


def items(questions: str, limit: int | None) -> Iterator[Item]:
    """Held-out scenes, or a JSONL file's questions. Raises InputError."""
    if questions == SCENES:
        return scene_items(limit or DEFAULT_SCENES)
    return file_items(Path(questions), limit)


def header(bundle: Bundle, questions: str) -> dict[str, Any]:
    """The first line of a results file: the hashes of both model files and of the set of questions."""
    files = {name: record.sha256 for name, record in bundle.manifest.files.items()}
    return {"model": files, "set": questions if questions == SCENES else sha256(Path(questions))}


def scene_items(limit: int) -> Iterator[Item]:
    """The first `limit` held-out questions about drawn scenes."""
    from pocketllava.models.demo import scenes

    for n, (scene, qa) in enumerate(scenes.held_out(limit)):
        turns: list[Message] = []
        picture = scene.draw()
        for k, turn in enumerate(qa.turns):
            turns += [
                Message("user", turn.question, (picture,) if k == 0 else ()),
                Message("assistant", turn.answer),
            ]
        yield Item(f"scenes-{n}", qa.kind, tuple(turns[:-1]), (qa.turns[-1].answer,))


def file_items(path: Path, limit: int | None) -> Iterator[Item]:
    """Lines {"image", "question", "answer" or "answers", optional "id" and "type"}; images lie relative to the file.

    Raises InputError naming the line.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    filled = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    for n, line in filled[:limit]:
        try:
            row = json.loads(line)
            answers = row["answers"] if "answers" in row else [row["answer"]]
            answers = [a["answer"] if isinstance(a, dict) else str(a) for a in answers]
            images = (_image(path, row["image"]),) if row.get("image") else ()
            question = Message("user", row["question"], images)
            yield Item(str(row.get("id", n)), str(row.get("type", "all")), (question,), tuple(answers))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {n}: {error!r}; expected a JSON object with image, question and answer(s)"
            ) from error


def run(model: Model, items: Iterable[Item], done: Mapping[str, Result]) -> Iterator[Result]:
    """Answer and score every item, except for those that are done already."""
    for item in items:
        if item.id in done:
            yield done[item.id]
            continue
        answer = model.chat(item.messages, options=SHORT_ANSWER).text.strip()
        yield Result(
            item.id, item.kind, answer, item.answers, exact(answer, item.answers), soft(answer, item.answers)
        )


def normalized(text: str) -> str:
    """Lower case, no articles, no punctuation at words' ends, number words as digits: VQA's normalization."""
    words = re.sub(r"[^\w\s'.-]|(?<!\d)\.|\.(?!\d)", " ", text.lower()).split()
    return " ".join(NUMBERS.get(w, w) for w in words if w not in ARTICLES)


def exact(answer: str, expected: Sequence[str]) -> float:
    """1 if the answer equals one of the expected ones after normalizing."""
    return float(normalized(answer) in {normalized(e) for e in expected})


def soft(answer: str, expected: Sequence[str]) -> float:
    """VQA's accuracy: min(1, annotators who said so / 3), averaged over leaving one out; exact for one answer.

    https://visualqa.org/evaluation.html
    """
    if len(expected) < VQA_ANSWERS:
        return exact(answer, expected)
    same = [normalized(answer) == normalized(e) for e in expected]
    return sum(min(1.0, (sum(same) - s) / VQA_ANSWERS) for s in same) / len(same)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """{"n", "accuracy", "soft_accuracy", "by_type", "yes_no"}; yes_no is about questions with such answers, if any."""
    kinds = sorted({r.kind for r in results})
    by_type = {k: _mean([r.exact for r in results if r.kind == k]) for k in kinds}
    table = {
        "n": len(results),
        "accuracy": _mean([r.exact for r in results]),
        "soft_accuracy": _mean([r.soft for r in results]),
        "by_type": by_type,
    }
    answerable = [r for r in results if normalized(r.expected[0]) in YES_NO]
    return table | ({"yes_no": yes_no(answerable)} if answerable else {})


def yes_no(results: Sequence[Result]) -> dict[str, float]:
    """Precision, recall and F1 of "yes" and the share of yeses, as POPE reports (arXiv:2305.10355)."""
    predicted = [normalized(r.answer).split(" ")[0] == "yes" for r in results]
    actual = [normalized(r.expected[0]) == "yes" for r in results]
    hits = sum(p and a for p, a in zip(predicted, actual, strict=True))
    precision, recall = hits / max(1, sum(predicted)), hits / max(1, sum(actual))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    accuracy = _mean([float(p == a) for p, a in zip(predicted, actual, strict=True)])
    shares = {
        "accuracy": accuracy,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes": _mean(list(map(float, predicted))),
    }
    return {name: round(value, 4) for name, value in shares.items()}


class ResultsFile:
    """A JSONL file: a header, then one result a line."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Raises InputError if the file has another header."""
        self.path, self.done = path, dict[str, Result]()
        if path.exists():
            first, *rest = read_text(path).splitlines() or [""]
            if _parsed(first) != header:
                raise InputError(
                    f"{path}: holds results of another model or set; give another --results file"
                )
            rows = (row for row in map(_parsed, rest) if row)
            self.done = {row["id"]: Result(**{**row, "expected": tuple(row["expected"])}) for row in rows}
        lines = [json.dumps(header), *(json.dumps(asdict(r), ensure_ascii=False) for r in self.done.values())]
        path.write_text("\n".join(lines) + "\n", "utf-8")

    def add(self, result: Result) -> None:
        """Append a result, unless it is there."""
        if result.id not in self.done:
            self.done[result.id] = result
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")


def _parsed(line: str) -> Any:
    """A line's JSON, or None for an incomplete one, which a kill leaves."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _image(path: Path, image: str) -> ImageSource:
    return image if image.startswith("data:") else path.parent / image


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0

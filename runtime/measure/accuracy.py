"""How often a model's answers are right: questions with known answers, scored as the field scores them.

Knows scoring and the two sources of questions (drawn scenes, a JSONL file); a model is anything with Llava's chat().
Results are appended to a file line by line, so an interrupted run continues with the next question.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pocketllava.errors import InputError
from pocketllava.models import Bundle
from pocketllava.models.bundle import sha256
from pocketllava.models.files import MAX_TEXT_BYTES, expanded, read_regular, read_text
from pocketllava.settings import nearest
from pocketllava.types import Answer, ImageSource, Message, Options

SCENES = "scenes"
DEFAULT_SCENES = 1000
KEYS = ("image", "question", "answer", "answers", "id", "type")
EXPECTED = (
    "expected a JSON object with question, answer or answers, and image, id and type where there are any"
)
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
    """Held-out scenes, or a JSONL file's questions, of which all are checked at once. Raises InputError."""
    if questions == SCENES:
        return scene_items(limit or DEFAULT_SCENES)
    return iter(file_items(expanded(questions), limit))


def header(bundle: Bundle, questions: str) -> dict[str, Any]:
    """The first line of a results file: the hashes of both model files and of the set of questions."""
    files = {name: record.digest for name, record in bundle.manifest.files.items()}
    return {"model": files, "set": questions if questions == SCENES else sha256(expanded(questions))}


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


def file_items(path: Path, limit: int | None) -> list[Item]:
    """Lines {"image", "question", "answer" or "answers", optional "id" and "type"}; images lie relative to the file.

    Every line is checked, those beyond the limit too. Raises InputError naming the first wrong one.
    """
    try:
        lines = read_text(path).split("\n")  # not splitlines(): JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    items: dict[str, Item] = {}
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = _item(path, n, line)
            if item.id in items:
                raise ValueError(f"id {item.id!r} a second time")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}, line {n}: {_fault(error)}; {EXPECTED}") from error
        items[item.id] = item
    if not items:
        raise InputError(f"{path}: no questions; {EXPECTED} a line")
    return list(items.values())[:limit]


def _item(path: Path, n: int, line: str) -> Item:
    """One line's question. Raises ValueError, KeyError, TypeError, RecursionError."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise TypeError(f"found {type(row).__name__}")
    for key in row:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}{nearest(key, KEYS)}".removesuffix("?"))
    if "answer" in row and "answers" in row:
        raise ValueError("both answer and answers")
    answers = row["answers"] if "answers" in row else [row["answer"]]
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"answers is {answers!r}, expected at least one")
    answers = [_whole("answer", a.get("answer") if isinstance(a, dict) else a) for a in answers]
    question = _whole("question", row["question"])
    images = (_image(path, row["image"]),) if row.get("image") is not None else ()
    kind = _whole("type", row.get("type", "all"))
    return Item(_whole("id", row.get("id", n)), kind, (Message("user", question, images),), tuple(answers))


def _whole(name: str, value: Any) -> str:
    """A text, or a number as one. Raises TypeError, ValueError."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected a text")
    text = str(value)
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text.encode().decode()  # halves of characters are no text


def _image(path: Path, image: Any) -> ImageSource:
    """A data URI, or a file that is there. Raises TypeError, ValueError."""
    if not isinstance(image, str) or not image:
        raise TypeError(f"image is {image!r}, expected a path")
    if image[:5].lower() == "data:":
        return image
    file = path.parent / image
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"image {str(file)!r} is no regular file")
    except OSError as error:
        raise ValueError(f"image {str(file)!r}: {error.strerror or error}") from error
    return file


def _fault(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"found no {error.args[0]!r}"
    return f"not JSON ({error})" if isinstance(error, json.JSONDecodeError | RecursionError) else str(error)


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
    """A JSONL file: a header, then one result a line. As a context, it removes a new file that got no result."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Raises InputError if the file has another header, or cannot be written."""
        self.path, self.done = path, dict[str, Result]()
        self._new = not path.exists()
        try:
            if self._new:
                path.write_text(json.dumps(header) + "\n", "utf-8")
            else:
                self._continue(header)
        except (OSError, UnicodeDecodeError) as error:
            raise _unwritable(path, error) from error

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._new and not self.done:
            self.path.unlink(missing_ok=True)

    def _continue(self, header: dict[str, Any]) -> None:
        """Read the results that are there; a line that a kill cut off is removed."""
        data = read_regular(self.path, MAX_TEXT_BYTES)
        first, *rest = data.decode("utf-8-sig").split("\n")
        if _parsed(first) != header:
            raise InputError(
                f"{self.path}: holds results of another model or set; give another --results file"
            )
        try:
            rows = [row for row in map(_parsed, rest) if row]
            self.done = {row["id"]: Result(**{**row, "expected": tuple(row["expected"])}) for row in rows}
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.path}: a line that is no result; give another --results file") from error
        os.truncate(self.path, data.rfind(b"\n") + 1)

    def add(self, result: Result) -> None:
        """Append a result, unless it is there. Raises InputError."""
        if result.id not in self.done:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line_of(result) + "\n")
            except OSError as error:
                raise _unwritable(self.path, error) from error
            self.done[result.id] = result


def line_of(result: Result) -> str:
    """A result as a line of JSON."""
    return json.dumps(asdict(result), ensure_ascii=False)


def _unwritable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path}: cannot be written ({reason}); give another --results file, or - for stdout")


def _parsed(line: str) -> Any:
    """A line's JSON, or None for an incomplete one, which a kill leaves."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0

"""A run's events as a bar on a terminal, or as lines of JSON. Counts what became of each picture."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import INERT, complain
from pocketllava.models.files import utf8

if TYPE_CHECKING:
    from pocketllava.album.captioner import Event, Plan
    from pocketllava.album.walk import Count


class Show(ABC):
    """What a person or a program sees of a run."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.marks: Counter[str] = Counter()
        self.failed = 0

    @abstractmethod
    def start(self, line: str, count: Count, plan: Plan) -> None:
        """Before the model is loaded."""

    @abstractmethod
    def say(self, line: str) -> None:
        """A remark meanwhile; may be called by a signal handler."""

    def event(self, event: Event) -> None:
        """One picture further."""
        self.kinds[event.kind] += 1
        self.failed += event.failed
        if event.given.mark:
            self.marks[event.given.mark] += 1
        self.shown(event)

    @abstractmethod
    def shown(self, event: Event) -> None:
        """Show it."""

    @abstractmethod
    def end(self, path: Path, *, stopped: bool) -> None:
        """After the last picture."""


class Bar(Show):
    """A bar with rate and time left on a terminal; a line for each error."""

    def __init__(self, quiet: bool) -> None:
        super().__init__()
        self._quiet, self._path = quiet, ""
        self._bar: Any = None

    def start(self, line: str, count: Count, plan: Plan) -> None:
        from tqdm import tqdm

        click.echo(line.translate(INERT), err=True)
        self._count, self._limit = count, plan.limit
        self._share = plan.shard.count if plan.shard else 1
        self._bar = tqdm(total=self._total(), unit="picture", disable=True if self._quiet else None)

    def say(self, line: str) -> None:
        self._bar.clear()
        click.echo(line, err=True)

    def shown(self, event: Event) -> None:
        if event.kind == "failed":
            self._bar.clear()
            complain("warning", f"{utf8(event.path)}: {_reason(event)}")
        if self._bar.disable:
            return
        self._bar.total = self._total()
        if event.path != self._path:
            self._path = event.path
            if event.kind == "skipped":  # no work, so that the rate and the time left stay true
                self._bar.initial += 1
            self._bar.update(1)
        if self.failed:
            self._bar.set_postfix_str(f"{self.failed} failed", refresh=False)

    def end(self, path: Path, *, stopped: bool) -> None:
        self._bar.close()
        click.echo(final_line(self, path, stopped=stopped).translate(INERT), err=True)

    def _total(self) -> int | None:
        if not self._count.done:
            return None
        found = -(-self._count.found // self._share)
        return min(found, self._limit) if self._limit else found


class Lines(Show):
    """One JSON object an event, on stdout."""

    def start(self, line: str, count: Count, plan: Plan) -> None:
        questions = [question.prompt for question in plan.questions]
        _print("start", pictures=count.found if count.done else None, questions=questions, plan=line)

    def say(self, line: str) -> None:
        click.echo(line, err=True)

    def shown(self, event: Event) -> None:
        fields: dict[str, Any] = {"path": utf8(event.path)}
        given = event.given
        if event.failed:
            fields["error"] = _reason(event)
        if event.question is not None:
            fields["question"] = event.question.prompt
        if given.text is not None:
            fields |= {
                "caption": given.text, "json": json.loads(given.record) if given.record else None,
                "tokens": given.tokens, "finish_reason": given.finish_reason, "mark": given.mark or None,
                "seconds": given.seconds,
            }  # fmt: skip
        _print(event.kind, **fields)

    def end(self, path: Path, *, stopped: bool) -> None:
        _print(
            "end",
            **self.kinds,
            failures=self.failed,
            marks=self.marks,
            stopped=stopped,
            album=utf8(str(path)),
        )


def final_line(show: Show, path: Path, *, stopped: bool) -> str:
    """What was done, what failed, how to go on."""
    kinds = show.kinds
    parts = [f"{kinds['answer']:,} answers"]
    parts += [f"{kinds[kind]:,} {words}" for kind, words in
              (("copied", "known from equal pictures"), ("skipped", "pictures unchanged")) if kinds[kind]]  # fmt: skip
    parts += [f"{n:,} marked as {mark}" for mark, n in show.marks.items()]
    line = f"{', '.join(parts)}; album {path}"
    if show.failed:
        line += f"; {show.failed:,} failed, --retry-errors tries them again"
    return line + ("; stopped, the same command goes on" if stopped else "")


def _reason(event: Event) -> str:
    return str(event.given.error).removeprefix(f"{event.path}: ").removeprefix("image: ")


def _print(event: str, **fields: Any) -> None:
    click.echo(json.dumps({"event": event, **fields}, ensure_ascii=False))
    sys.stdout.flush()

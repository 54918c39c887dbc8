"""A run whose captions are exported as they come: files beside pictures at once, one for all of them every so often.

Knows the run and the exports. Whatever ends it, every file is whole: an album has what a killed run did not write, and
the next run writes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

from pocketllava.album.captioner import Event, Plan, run
from pocketllava.album.database import database_errors
from pocketllava.album.export import BESIDE, Export, check_album, write
from pocketllava.album.exports.captions import Beside, Report
from pocketllava.album.journal import Album, Question, Row
from pocketllava.errors import InputError
from pocketllava.llava import Llava

NO_TIMES = ("webdataset",)  # tars that hold all pictures


@dataclass
class Exported:
    """A run's export, of its first question. every_s: how often a file for all pictures is written meanwhile.

    report: what was written, once the run's events have ended.
    """

    export: Export
    every_s: float | None = None
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        if self.every_s is None:
            return
        if self.export.format in (*BESIDE, *NO_TIMES):
            how = "written at the end" if self.export.format in NO_TIMES else "written as captions come"
            raise InputError(f"every: found {self.every_s:g} s with {self.export.format}, which is {how}")
        if self.export.style.existing != "overwrite":
            raise InputError("every: it replaces its file each time; give it --existing overwrite")

    def events(
        self,
        llava: Llava,
        album: Album,
        plan: Plan,
        *,
        finish: Callable[[], bool] = lambda: False,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """run()'s events, each after what is written for it."""
        with database_errors(album.path):
            question, before = album.add_question(plan.questions[0]), album.newest
            check_album(album, question, self.export)
        events = run(llava, album, plan, finish=finish, should_stop=should_stop)
        beside = self.export.format in BESIDE
        with self.export.beside(waits=True) if beside else nullcontext() as writer:
            if writer is not None:
                self.report = writer.report
                yield from self._beside(writer, album, question, events)
                if not (finish() or should_stop()):
                    _earlier(writer, album, question, before)
                return
        yield from self._every(album, question, events)
        if self.every_s is not None or not (finish() or should_stop()):
            self.report = write(album, question, self.export)

    def _beside(
        self, writer: Beside, album: Album, question: Question, events: Iterator[Event]
    ) -> Iterator[Event]:
        for event in events:
            if event.question is not None and event.question.id == question.id:
                writer.add(Row(event.path, album.file(event.path), "", event.question, event.given))
            elif event.kind == "failed" and event.question is None:
                self.report.left_out["failed"] += 1
            yield event

    def _every(self, album: Album, question: Question, events: Iterator[Event]) -> Iterator[Event]:
        written_s = time.monotonic()
        for event in events:
            if self.every_s is not None and time.monotonic() - written_s >= self.every_s:
                write(album, question, self.export)
                written_s = time.monotonic()
            yield event


def _earlier(writer: Beside, album: Album, question: Question, newest: int) -> None:
    """What earlier runs answered; theirs may have been killed before it was written."""
    with database_errors(album.path):
        for row in album.rows(question, "WHERE a.id <= ?", (newest,)):
            writer.add(row)

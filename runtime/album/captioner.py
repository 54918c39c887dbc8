"""The run: pictures that have no answer yet are read, asked about and written down, one event each.

Knows the album, the walk and the model; prints nothing. Everything happens in the caller's thread but reading.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from re import Pattern
from typing import Any, Literal

from pocketllava.album import alike
from pocketllava.album.asking import Job, Reply, replies, together, whole_text
from pocketllava.album.database import database_errors
from pocketllava.album.journal import Album, Given, Picture, Question
from pocketllava.album.quality import mark_of
from pocketllava.album.reading import AHEAD, Read, read, state
from pocketllava.album.walk import Shard, Walk
from pocketllava.album.words import TAGS, filled, has_words
from pocketllava.engine.many import results_ahead
from pocketllava.llava import Llava
from pocketllava.types import Options

Kind = Literal["answer", "copied", "skipped", "failed"]


@dataclass(frozen=True)
class Plan:
    """What to do. keep_features: for pictures that look alike. deny: what marks a refusal. batch: answers at once."""

    walk: Walk
    questions: tuple[Question, ...]
    options: Options
    shard: Shard | None = None
    limit: int | None = None
    retry_errors: bool = False
    keep_features: bool = True
    deny: tuple[Pattern[str], ...] = ()
    batch: int | Literal["auto"] = 1


@dataclass(frozen=True)
class Event:
    """What became of a picture and a question; `skipped` and unreadable pictures have no question."""

    kind: Kind
    path: str
    question: Question | None = None
    given: Given = field(default_factory=Given)

    @property
    def failed(self) -> bool:
        """Whether there is an error, of this run or an earlier one."""
        return self.given.error is not None


@dataclass(frozen=True)
class _Looked:
    """A picture that some questions are to be asked about; event: all that is to be said where there are none."""

    path: str
    picture: Picture
    questions: tuple[Question, ...] = ()
    event: Event | None = None


def run(
    llava: Llava,
    album: Album,
    plan: Plan,
    *,
    finish: Callable[[], bool] = lambda: False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Ask what is not answered yet. finish: end after the picture that is being answered; should_stop: at once.

    Raises InputError where the album cannot be written; what was answered until then is in it.
    """
    with database_errors(album.path):
        yield from _Run(llava, album, plan, finish, should_stop).events()


def to_do(album: Album, plan: Plan) -> int:
    """How many pictures would be read; the album stays as it is."""
    with database_errors(album.path):
        album.database.execute("BEGIN")
        try:
            looked = _Run(None, album, plan, lambda: False, lambda: False).looked()
            return sum(picture.event is None for picture in looked)
        finally:
            album.database.execute("ROLLBACK")


class _Run:
    def __init__(
        self,
        llava: Any,
        album: Album,
        plan: Plan,
        finish: Callable[[], bool],
        should_stop: Callable[[], bool],
    ) -> None:
        self.llava, self.album, self.plan, self.finish, self.should_stop = (
            llava,
            album,
            plan,
            finish,
            should_stop,
        )
        self.questions = tuple(album.add_question(question) for question in plan.questions)
        self._done: list[Event] = []  # what was decided without asking, on the way to the next job

    def events(self) -> Iterator[Event]:
        with closing(self._jobs()) as jobs:
            for job, reply in self._replies(jobs):
                yield from self._take()
                picture, question, read, asked = job.context
                given = replace(self._given(reply, read), asked=asked)
                self.album.put(picture, question, given)
                if given.error is None:
                    self._keep_features(read.pixels, job.image)
                yield Event("failed" if given.error else "answer", picture.path, question, given)
            yield from self._take()

    def _replies(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Reply | Exception]]:
        """One after another, or several at once where all are asked the same one question."""
        plan, prompt = self.plan, self.questions[0].prompt
        if plan.batch == 1 or len(self.questions) > 1 or has_words(prompt):
            return replies(self.llava, jobs, plan.options, self.should_stop)
        return together(self.llava, jobs, prompt, plan.options, plan.batch, self.should_stop)

    def _take(self) -> list[Event]:
        done, self._done = self._done, []
        return done

    def _jobs(self) -> Generator[Job, None, None]:
        with closing(results_ahead(self.looked(), self._read, AHEAD)) as pictures:
            for looked, content in pictures:
                if self.finish() or self.should_stop():
                    return
                if looked.event is not None:
                    self._done.append(looked.event)
                elif not content.sha256:
                    self._unreadable(looked, content)
                else:
                    yield from self._questions_about(looked, content)

    def looked(self) -> Iterator[_Looked]:
        """Each picture of the plan, and what is to be asked about it."""
        paths = self.plan.walk.files(self._folder_failed)
        shard = self.plan.shard
        if shard is not None:
            paths = (path for path in paths if shard.has(self.album.relative(path)))
        for path in islice(paths, self.plan.limit):
            yield self._look(path)

    def _look(self, path: str) -> _Looked:
        """Without opening the file."""
        status, relative = state(path), self.album.relative(path)
        if status is None:
            return _Looked(path, Picture(relative, -1, -1), self.questions)
        picture = Picture(relative, status.st_size, status.st_mtime_ns)
        known = self.album.known(picture, with_errors=not self.plan.retry_errors)
        todo = tuple(q for q in self.questions if q.id not in known)
        if todo:
            return _Looked(path, picture, todo)
        failed = any(known[q.id] for q in self.questions)
        given = Given(error="it failed in an earlier run") if failed else Given()
        return _Looked(path, picture, (), Event("skipped", relative, None, given))

    def _read(self, looked: _Looked) -> Read:
        """In a thread of its own."""
        if looked.event is not None:
            return Read()
        with_tags = any(TAGS in question.prompt for question in looked.questions)
        return read(looked.path, self.llava.fingerprint, with_tags=with_tags)

    def _unreadable(self, looked: _Looked, content: Read) -> None:
        """It is written down, but never in the place of what is known of it."""
        given = Given(error=content.error)
        if looked.picture.size >= 0 and self.album.picture(looked.picture.path) is None:
            picture = self.album.add_picture(looked.picture)
            for question in looked.questions:
                self.album.put(picture, question, given)
        self._done.append(Event("failed", looked.picture.path, None, given))

    def _questions_about(self, looked: _Looked, content: Read) -> Iterator[Job]:
        picture = self.album.add_picture(replace(looked.picture, sha256=content.sha256))
        for question in looked.questions:
            asked = ""
            if has_words(question.prompt):
                asked = filled(question.prompt, self.album.file(picture.path), content.tags)
            given = self._known(question, content, asked)
            if given is None:
                yield Job(content.data, asked or question.prompt, (picture, question, content, asked))
                continue
            self.album.put(picture, question, given)
            self._done.append(Event("failed" if given.error else "copied", picture.path, question, given))

    def _known(self, question: Question, content: Read, asked: str) -> Given | None:
        """An answer that needs no model: to the same bytes or pixels, or that they, or its tags, cannot be read."""
        if content.error is not None:
            return Given(error=content.error, asked=asked)
        if content.tags_error is not None and TAGS in question.prompt:
            return Given(error=content.tags_error, asked=question.prompt)  # equal to nobody's
        same = self.album.same(question, content.sha256, asked)
        if same is not None and not (same.error and self.plan.retry_errors):
            return same
        return self.album.alike(question, content.pixels, asked)

    def _given(self, reply: Reply | Exception, content: Read) -> Given:
        if not isinstance(reply, Reply):
            return Given(error=str(reply), pixels=content.pixels)
        options = self.plan.options
        text = whole_text(reply.text, options)
        mark = mark_of(
            text, reply.finish_reason, looped=reply.looped, retried=reply.retried, deny=self.plan.deny
        )
        record = reply.text if options.schema is not None and reply.finish_reason == "stop" else None
        return Given(
            text,
            record,
            reply.tokens,
            reply.finish_reason,
            mark,
            round(reply.seconds, 3),
            None,
            content.pixels,
        )

    def _keep_features(self, pixels: str, image: bytes) -> None:
        if self.plan.keep_features:
            tower = self.questions[0].model_sha256
            if not alike.has(self.album, pixels, tower):
                alike.put(self.album, pixels, tower, self.llava.image_features(image))

    def _folder_failed(self, path: str, error: OSError) -> None:
        given = Given(error=f"cannot be read ({error.strerror or error})")
        self._done.append(Event("failed", self.album.relative(path), None, given))

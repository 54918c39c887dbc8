"""An album: what is asked once, what is found again, what goes on after a kill; the demo model answers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from pocketllava import ContextOverflow, InputError, Llava, Options
from pocketllava.album import alike, database
from pocketllava.album.captioner import Event, Plan, run
from pocketllava.album.export import Export
from pocketllava.album.exporting import Exported
from pocketllava.album.exports.captions import Style
from pocketllava.album.journal import Album, Given, Picture, Question
from pocketllava.album.merge import merge
from pocketllava.album.prompts import questions
from pocketllava.album.quality import LoopFinder, mark_of, patterns, whole_sentences
from pocketllava.album.search import found, fts5_query
from pocketllava.album.walk import Shard, Walk
from pocketllava.cli import cli
from pocketllava.models.demo import scenes
from pocketllava.names import open_bundle
from pocketllava.vision.feature_cache import FeatureCache

SEED = scenes.HELD_OUT_SEEDS.start + 3
COUNT = "How many objects are there?"
WHOLE = "SELECT path, p.sha256, text, tokens, finish_reason, mark, error, pixels FROM pictures p JOIN answers a ON a.picture = p.id ORDER BY path"


@pytest.fixture(scope="module")
def demo() -> Iterator[Llava]:
    with Llava.load("demo", n_threads=1) as model:
        yield model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six scenes in several formats, two of them the same pixels, and a damaged file."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for k, name in enumerate(("a.png", "b.jpg", "c.webp", "d.bmp", "more/e.png")):
        scenes.scene(SEED + k).draw().save(folder / name)
    scenes.scene(SEED).draw().save(folder / "more" / "same as a.bmp")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    return folder


def plan(folder: Path, *prompts: str, options: Options | None = None, **more: Any) -> Plan:
    options = options or Options()
    asked = questions(open_bundle("demo"), prompts or (COUNT,), options, {})
    return Plan(Walk((str(folder),), recursive=True), asked, options, **more)


def caption(demo: Llava, folder: Path, *prompts: str, name: str = "test.album", **more: Any) -> list[Event]:
    """A run into an album beside the folder."""
    wanted = plan(folder, *prompts, **more)
    with Album(folder.parent / name, root=wanted.walk.root) as album:
        return list(run(demo, album, wanted))


def kinds(events: list[Event]) -> dict[str, str]:
    return {event.path: event.kind for event in events}


def rows(path: Path) -> list[Any]:
    with sqlite3.connect(path) as opened:
        return opened.execute(WHOLE).fetchall()


def test_captions_are_what_ask_says_and_equal_pixels_are_asked_once(demo: Llava, photos: Path) -> None:
    events = caption(demo, photos)
    assert kinds(events) == {
        "a.png": "answer", "b.jpg": "answer", "broken.png": "failed", "c.webp": "answer", "d.bmp": "answer",
        "more/e.png": "answer", "more/same as a.bmp": "copied",
    }  # fmt: skip
    for event in events:
        if event.kind != "failed":
            assert event.given.text == demo.ask(photos / event.path, COUNT).text
    assert "damaged" in str(next(e for e in events if e.failed).given.error)


@pytest.mark.parametrize("batch", [3, "auto"])
def test_several_at_once_give_the_same_captions(demo: Llava, photos: Path, batch: int) -> None:
    alone = {e.path: (e.given.text, e.given.finish_reason) for e in caption(demo, photos)}
    events = caption(demo, photos, name="together.album", batch=batch)
    assert {e.path: (e.given.text, e.given.finish_reason) for e in events} == alone
    assert [e.path for e in events if e.failed] == ["broken.png"]
    with Album(photos.parent / "together.album") as album:
        assert {row.path: row.given.text for row in album.rows()} == {p: t for p, (t, _) in alone.items()}


def test_a_second_run_opens_no_file(demo: Llava, photos: Path) -> None:
    caption(demo, photos)
    for path in photos.rglob("*.*"):
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)  # the same size and time, and no picture
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    events = caption(demo, photos)
    assert {e.kind for e in events} == {"skipped"}
    assert sum(e.failed for e in events) == 1


def test_errors_are_tried_again_when_asked_for(demo: Llava, photos: Path) -> None:
    caption(demo, photos)
    assert kinds(caption(demo, photos, retry_errors=True))["broken.png"] == "failed"
    shutil.copy(photos / "b.jpg", photos / "broken.png")
    assert kinds(caption(demo, photos))["broken.png"] == "copied"


def test_a_moved_picture_is_known_by_its_content(demo: Llava, photos: Path) -> None:
    before = {e.path: e.given.text for e in caption(demo, photos)}
    (photos / "b.jpg").rename(photos / "more" / "moved.jpg")
    assert kinds(caption(demo, photos))["more/moved.jpg"] in ("copied", "skipped")
    with Album(photos.parent / "test.album") as album:
        paths = {row.path: row.given.text for row in album.rows()}
    assert paths["more/moved.jpg"] == before["b.jpg"]
    assert "b.jpg" not in paths


def test_another_prompt_or_option_is_another_column(demo: Llava, photos: Path) -> None:
    caption(demo, photos)
    assert {e.kind for e in caption(demo, photos, COUNT, "Describe the image.")} >= {"answer", "failed"}
    caption(demo, photos, options=Options(max_tokens=1))
    with Album(photos.parent / "test.album") as album:
        assert [(q.prompt, dict(q.options)) for q in album.questions()] == [
            (COUNT, {}), ("Describe the image.", {}), (COUNT, {"max_tokens": 1}),
        ]  # fmt: skip
        assert album.question("2").prompt == "Describe the image."
        with pytest.raises(
            InputError, match=r"found 2 columns named .* expected one; choose one with --column: 1"
        ):
            album.question(COUNT)


def test_several_questions_evaluate_a_picture_once(demo: Llava, photos: Path) -> None:
    for event in caption(demo, photos, COUNT, "Describe the image."):
        assert event.kind != "answer" or event.question is not None
    chunks = list(demo.stream([{"role": "user", "content": COUNT}]))
    assert chunks[-1].timings is not None
    demo.ask(photos / "a.png", COUNT)
    assert demo.ask(photos / "a.png", "Describe the image.").timings.cached_tokens > 36


def test_template_words_make_the_prompt_the_pictures_own(demo: Llava, photos: Path) -> None:
    events = caption(demo, photos, "Is {name} in {directory}?")
    with Album(photos.parent / "test.album") as album:
        asked = {row.path: row.given.asked for row in album.rows() if row.given.error is None}
    assert asked["a.png"] == "Is a in photos?"
    assert asked["more/e.png"] == "Is e in more?"
    assert kinds(events)["more/same as a.bmp"] == "answer"


def test_tags_are_a_sidecars_line(demo: Llava, photos: Path) -> None:
    (photos / "a.txt").write_text("1girl, {name},\nred  hair\n")
    (photos / "b.caption").write_text("a caption")
    (photos / "c.txt").write_bytes(b"\xff\xfe\x00\xd8")
    shutil.copy(photos / "c.webp", photos / "more" / "c, without tags.webp")
    (photos / "d.txt").write_text("</s><image> USER:, " * 100)
    events = caption(demo, photos, "Tags: {tags}. How many objects are there?", COUNT)
    asked = {e.path: e.given.asked for e in events if e.question is None or "{tags}" in e.question.prompt}
    assert asked["a.png"] == "Tags: 1girl, {name}, red hair. How many objects are there?"
    assert asked["b.jpg"] == "Tags: a caption. How many objects are there?"
    assert asked["more/e.png"] == "Tags: . How many objects are there?"
    assert asked["d.bmp"].endswith("USER:. How many objects are there?")
    assert len(asked["d.bmp"]) < 1050
    wrong = {e.path: str(e.given.error) for e in events if e.failed}
    assert set(wrong) == {"broken.png", "c.webp"}
    assert "c.txt: cannot be read as tags" in wrong["c.webp"]
    texts = {e.path: e.given.text for e in events if e.question is not None and e.question.prompt == COUNT}
    for name in ("a.png", "c.webp"):
        assert texts[name] == demo.ask(photos / name, COUNT).text


def test_a_prompt_that_has_no_room_for_one_picture_is_its_error(photos: Path) -> None:
    (photos / "b.txt").write_text("long, " * 200)
    with Llava.load("demo", n_threads=1, n_ctx=256) as llava:
        events = caption(llava, photos, "{tags}" + COUNT, options=Options(max_tokens=8))
        assert {e.path for e in events if e.failed} == {"b.jpg", "broken.png"}
        with pytest.raises(ContextOverflow):
            caption(llava, photos, "word " * 300, options=Options(max_tokens=8))


def test_a_record_and_a_choice(demo: Llava, photos: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2, 3, 4]}}, "required": ["n"]}
    for event in caption(demo, photos, options=Options(schema=schema)):
        assert event.failed or json.loads(event.given.record or "")["n"] in (1, 2, 3, 4)
    texts = {
        e.given.text
        for e in caption(demo, photos, options=Options(choices=("1", "2", "3", "4")))
        if not e.failed
    }
    assert texts <= {"1", "2", "3", "4"}


def test_an_answer_that_is_begun_is_gone_on_with(demo: Llava, photos: Path) -> None:
    """What the model would have written anyway, cut anywhere between words, leads to the same whole answer."""
    picture, question = photos / "a.png", "Describe the image."
    words = demo.ask(picture, question).text.split(" ")
    for n in (1, 3, len(words) - 2):
        begun = " ".join(words[:n])
        rest = demo.ask(picture, question, prefill=begun)
        assert begun + rest.text == " ".join(words)
    events = caption(demo, photos, question, options=Options(prefill="There is "))
    assert events[0].given.text == " ".join(words)
    with pytest.raises(InputError, match="prefill: found with schema"):
        Options(prefill="a", schema={"type": "object"})


def test_the_begun_answers_tokens_are_those_of_a_whole_one(demo: Llava, photos: Path) -> None:
    from pocketllava.types import Beginning, Message

    turn = Message("user", "Describe the image.", photos / "a.png")
    answer = demo.chat([turn])
    with demo.session() as session:
        prompt, begun = session.count([turn]), session.count([turn, Beginning(answer.text)])
    assert tuple(begun[len(prompt) :]) == answer.token_ids
    assert begun[: len(prompt)] == prompt


def test_fingerprints_tell_pixels(demo: Llava, photos: Path) -> None:
    assert demo.fingerprint(photos / "a.png") == demo.fingerprint(photos / "more" / "same as a.bmp")
    assert demo.fingerprint(photos / "a.png") != demo.fingerprint(photos / "b.jpg")


def test_four_shards_are_the_whole(demo: Llava, photos: Path) -> None:
    caption(demo, photos, name="whole.album")
    for k in (1, 2, 3, 4):
        caption(demo, photos, name=f"part{k}.album", shard=Shard(k, 4))
    with Album(photos.parent / "merged.album", root=str(photos)) as album:
        for k in (1, 2, 3, 4):
            merge(album, photos.parent / f"part{k}.album")
            assert merge(album, photos.parent / f"part{k}.album").added == 0
    assert rows(photos.parent / "merged.album") == rows(photos.parent / "whole.album")
    with Album(photos.parent / "merged.album") as album:
        assert len(alike.nearest(album, album.questions()[0].model_sha256, np.ones(256, np.float32), 9)) == 5


@pytest.mark.slow
def test_a_killed_run_goes_on(demo: Llava, photos: Path) -> None:
    for k in range(60):
        scenes.scene(SEED + 100 + k).draw().save(photos / f"{k:03d}.png")
    caption(demo, photos, name="whole.album")
    path, rng, found = photos.parent / "killed.album", random.Random(5), 0
    command = [
        sys.executable,
        "-m",
        "pocketllava",
        "caption",
        "demo",
        str(photos),
        "-r",
        "-q",
        "-p",
        COUNT,
        "-t",
        "1",
        "--to",
        "txt",
        "--album",
        str(path),
    ]

    def sidecars() -> dict[str, str]:
        return {
            f.relative_to(photos).with_suffix("").as_posix(): f.read_text() for f in photos.rglob("*.txt")
        }

    def captions() -> dict[str, str]:
        return {Path(row[0]).with_suffix("").as_posix(): row[2] for row in rows(path) if row[2]}

    for _ in range(4):
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while not (path.exists() and path.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.3, 0.8))
        child.kill()
        child.wait()
        with sqlite3.connect(path) as opened:
            assert opened.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found, before = len(rows(path)), found
        assert found >= before
        assert sidecars().items() <= captions().items()
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 3
    assert rows(path) == rows(photos.parent / "whole.album")
    assert sidecars() == captions()


def test_the_walk_is_stable_and_hides_what_is_hidden(tmp_path: Path) -> None:
    for name in (
        "b/2.JPG",
        "b/1.png",
        "a/z.webp",
        "a/.hidden.png",
        ".git/x.png",
        "top.png",
        "notes.txt",
        "b/c/deep.gif",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    walk = Walk((str(tmp_path),), recursive=True)
    names = [Path(f).relative_to(tmp_path).as_posix() for f in walk.files()]
    assert names == ["top.png", "a/z.webp", "b/1.png", "b/2.JPG", "b/c/deep.gif"]
    assert list(walk.count(lambda: False))[-1] == 5
    assert [Path(f).name for f in Walk((str(tmp_path), str(tmp_path / "notes.txt"))).files()] == [
        "top.png",
        "notes.txt",
    ]
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        Walk(("nowhere",))


@given(st.lists(st.text(max_size=8), unique=True, max_size=40), st.integers(1, 7))
def test_every_path_is_in_one_shard(paths: list[str], count: int) -> None:
    for path in paths:
        assert (
            sum(Shard(k, count).has(path.encode("utf-8", "replace").decode()) for k in range(1, count + 1))
            == 1
        )


def small(path: Path, *captions: str) -> Album:
    """An album with these captions."""
    album = Album(path, root=str(path.parent / "p"))
    question = album.add_question(Question("q", "q", {}, "m", "m"))
    for n, text in enumerate(captions):
        picture = album.add_picture(Picture(f"{n}.png", n, n, f"sha {n}"))
        album.put(picture, question, Given(text))
    return album


def test_find_ranks_and_takes_prefixes_phrases_and_accents(tmp_path: Path) -> None:
    texts = (
        "a green square at the left",
        "a square, left of a green star",
        "Ein Café in Zürich",
        "don't look",
        "greenish",
    )
    with small(tmp_path / "a.album", *texts) as album:

        def paths(words: str) -> list[str]:
            return [row.path for row in found(album, words)]

        assert sorted(paths("green square")) == ["0.png", "1.png"]
        assert paths('"green square"') == ["0.png"]
        assert paths("cafe zurich") == ["2.png"]
        assert sorted(paths("gree*")) == ["0.png", "1.png", "4.png"]
        assert paths("green NOT star") == ["0.png"]
        assert paths("don't") == ["3.png"]
        assert sorted(paths("cafe OR look")) == ["2.png", "3.png"]
        for wrong in ('"green', "green AND", "(green", "NOT", "NEAR(", "OR OR", ")"):
            try:
                paths(wrong)
            except InputError as error:
                assert "cannot be looked for" in str(error)
        with pytest.raises(InputError, match="words: 'green AND' cannot be looked for"):
            paths("green AND")


@given(st.text(max_size=30))
def test_whatever_is_looked_for_is_one_line_at_most(words: str) -> None:
    with sqlite3.connect(":memory:") as opened:
        opened.execute("CREATE VIRTUAL TABLE words USING fts5 (text)")
        try:
            opened.execute(
                "SELECT * FROM words WHERE words MATCH ?",
                (fts5_query(words.encode("utf-8", "replace").decode()),),
            ).fetchall()
        except InputError:
            pass
        except sqlite3.OperationalError as error:
            assert "fts5" in str(error) or "unterminated" in str(error) or "no such column" in str(error)


def test_every_f16_number_is_read_as_numpy_reads_it() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view("<f2")
    every = every[np.isfinite(every)]
    found = np.empty(every.shape, np.float32)
    alike.widen(every.view("<i2"), found)
    assert np.array_equal((found * alike.BIAS).view(np.int32), every.astype(np.float32).view(np.int32))


def test_pictures_that_look_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    with small(tmp_path / "a.album", *"abc") as album:
        vectors = [rng.standard_normal((4, 16)).astype(np.float32) for _ in range(3)]
        for n, features in enumerate(vectors):
            alike.put(album, f"sha {n}", "tower", features)
        wanted = alike.unit(vectors[1].mean(axis=0))
        nearest = alike.nearest(album, "tower", wanted, 2)
        assert nearest[0][0] == "sha 1"
        assert nearest[0][1] == pytest.approx(1, abs=2e-3)
        expected = sorted((float(alike.unit(v.mean(axis=0)) @ wanted) for v in vectors), reverse=True)[:2]
        assert [cosine for _, cosine in nearest] == pytest.approx(expected, abs=2e-3)


def test_features_of_a_small_model_do_not_pile_up() -> None:
    """128 MB of them would be thousands of pictures, and a run's memory would grow for minutes."""
    kept = FeatureCache()
    for n in range(400):
        kept.put(str(n), np.zeros((2, 4), np.float32))
    assert kept.get("0", (2, 4)) is None
    assert kept.get("399", (2, 4)) is not None
    assert kept.n_bytes <= 256 * 32


def test_loops_cuts_and_refusals_are_marked() -> None:
    loop = LoopFinder()
    assert not loop.add(range(50))
    assert loop.add([7] * 10)
    assert not LoopFinder().add([*range(8), 99, *range(8)])
    deny = patterns(["as an ai", "^sorry"])
    assert mark_of("As an AI I cannot", "stop", looped=False, retried=False, deny=deny) == "refused"
    assert mark_of("A dog on", "length", looped=False, retried=False, deny=deny) == "cut"
    assert mark_of("a a a", "length", looped=True, retried=True, deny=deny) == "loop"
    assert mark_of("A dog.", "stop", looped=False, retried=True, deny=deny) == "retried"
    assert mark_of("A dog.", "stop", looped=False, retried=False, deny=deny) == ""
    assert whole_sentences("A dog. It runs. In the") == "A dog. It runs."
    with pytest.raises(InputError, match=r"deny: '\(' is no regular expression"):
        patterns(["("])


def test_a_loop_is_asked_once_more_and_marked(endless: Any, photos: Path) -> None:
    """A model whose greedy answers never end, and repeat themselves."""
    options = Options(max_tokens=60)
    asked = questions(endless, (COUNT,), options, {})
    with Llava.load(endless.folder) as llava, Album(photos.parent / "a.album", root=str(photos)) as album:
        events = list(run(llava, album, Plan(Walk((str(photos / "a.png"),)), asked, options)))
    assert [e.given.mark for e in events] in (["loop"], ["cut"], ["retried"])


def test_older_albums_are_migrated_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.album"
    with sqlite3.connect(path) as old:
        old.executescript(database.MIGRATIONS[0])
        old.execute(f"PRAGMA application_id = {database.APPLICATION_ID}")
        old.execute("PRAGMA user_version = 1")
        old.execute("INSERT INTO pictures VALUES (1, 'a.png', 3, 4, 'sha')")
    with Album(path) as album:
        assert album.picture("a.png") == Picture("a.png", 3, 4, "sha", 1)
        alike.put(album, "sha", "tower", np.ones((2, 4), np.float32))
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as other:
        other.execute("CREATE TABLE mine (a)")
    text = tmp_path / "text.album"
    text.write_text("nothing of the kind")
    newer = tmp_path / "newer.album"
    with sqlite3.connect(newer) as other:
        other.execute(f"PRAGMA application_id = {database.APPLICATION_ID}")
        other.execute("PRAGMA user_version = 99")
    for wrong, message in (
        (foreign, "another program's database"), (text, "another kind of file"), (newer, "album of version 99"),
        (tmp_path, "found a folder"), (tmp_path / "none", "found nothing"),
    ):  # fmt: skip
        before = wrong.read_bytes() if wrong.is_file() else b""
        with pytest.raises(InputError, match=message):
            Album(wrong)
        assert before == (wrong.read_bytes() if wrong.is_file() else b"")


def test_names_that_are_not_utf8_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with Album(tmp_path / "a.album", root=str(tmp_path)) as album:
        question = album.add_question(Question("q", "q", {}, "m", "m"))
        album.put(album.add_picture(Picture(name, 1, 2, "sha")), question, Given("text"))
        assert [row.path for row in album.rows()] == [name]
        assert album.known(Picture(name, 1, 2), with_errors=True) == {question.id: False}


# The command line.


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, standalone_mode=False)


def test_the_commands(photos: Path) -> None:
    album = str(photos.parent / "photos.album")
    first = invoke("caption", "demo", str(photos), "-r", "--json", "-t", "1")
    assert first.return_value == 3
    events = [json.loads(line) for line in first.stdout.splitlines()]
    assert [e["event"] for e in events] == [
        "start",
        *["answer"] * 2,
        "failed",
        *["answer"] * 3,
        "copied",
        "end",
    ]
    assert events[0]["pictures"] == 7
    assert events[-1] | {"answer": 5, "copied": 1, "failed": 1, "failures": 1, "stopped": False} == events[-1]
    again = invoke("caption", "demo", str(photos), "-r", "-t", "1")
    assert "7 pictures unchanged" in again.stderr
    assert "1 failed, --retry-errors tries them again" in again.stderr
    shown = invoke("find", album, "there", "is", "--json", "--limit", "2")
    assert len(shown.stdout.splitlines()) == 2
    like = invoke("find", album, "--like", str(photos / "a.png"), "--limit", "2").stdout
    assert like.startswith("1.000  ")
    listed = invoke("album", "list", album).stdout
    assert "6 answers, 1 failed" in listed
    dry = invoke("caption", "demo", str(photos), "-r", "--dry-run", "-p", COUNT)
    assert "to be asked: 7 pictures; nothing was done" in dry.stderr
    taken = photos / "metadata.jsonl"
    taken.write_text("a file of the user's")
    refused = invoke(
        "caption", "demo", str(photos), "-r", "--dry-run", "--to", "metadata.jsonl", "--out", str(taken)
    )
    assert str(refused.exception) == f"{taken}: exists; --existing overwrite replaces it"


def exporting(
    demo: Llava, folder: Path, to: str, style: Style | None = None, every_s: float | None = None, n: int = 99
) -> tuple[Exported, list[Event]]:
    """n events of a run with an export, and what was reported."""
    wanted, exported = plan(folder), Exported(Export(to, style or Style()), every_s)
    with Album(folder.parent / "test.album", root=wanted.walk.root) as album:
        return exported, list(islice(exported.events(demo, album, wanted), n))


def test_sidecars_are_written_as_captions_come(demo: Llava, photos: Path) -> None:
    _, events = exporting(demo, photos, "txt", n=2)  # and no further: killed
    assert {e.path: (photos / e.path).with_suffix(".txt").read_text() for e in events} == {
        e.path: e.given.text for e in events
    }
    (photos / "b.txt").unlink()  # as if it had been killed before that
    exported, events = exporting(demo, photos, "txt")
    assert (exported.report.written, exported.report.kept, exported.report.left_out["failed"]) == (5, 1, 1)
    assert len(list(photos.rglob("*.txt"))) == 6
    assert not list(photos.rglob("*.partial"))
    again, _ = exporting(demo, photos, "txt", Style(existing="prepend", prefix="ohwx, "))
    assert again.report.written == 6
    assert (photos / "a.txt").read_text().startswith("ohwx, ")


def test_one_file_for_all_is_written_every_so_often(demo: Llava, photos: Path) -> None:
    exporting(demo, photos, "metadata.jsonl", Style(existing="overwrite"), every_s=1e-9, n=4)
    written = (photos / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in written] == ["a.png", "b.jpg", "c.webp"]
    exported, _ = exporting(demo, photos, "metadata.jsonl", Style(existing="overwrite"), every_s=1e9)
    assert exported.report.written == 6
    with pytest.raises(InputError, match="it replaces its file each time; give it --existing overwrite"):
        Exported(Export("jsonl", Style()), 5)
    for to in ("txt", "webdataset"):
        with pytest.raises(InputError, match=f"found 5 s with {to}, which is written"):
            Exported(Export(to, Style(existing="overwrite")), 5)


def test_what_is_there_already_is_told_before_the_start(photos: Path) -> None:
    (photos / "metadata.jsonl").write_text("mine")
    done = invoke("caption", "demo", str(photos), "-r", "--to", "metadata.jsonl", "-t", "1")
    assert "exists; --existing overwrite" in str(done.exception)
    assert not (photos.parent / "photos.album").exists()
    done = invoke(
        "caption",
        "demo",
        str(photos),
        "-r",
        "--to",
        "metadata.jsonl",
        "--existing",
        "overwrite",
        "-t",
        "1",
        "--every",
        "9",
    )
    assert done.return_value == 3
    assert "metadata.jsonl: 6 written" in done.stderr


def test_sidecars_that_would_be_one_file_are_refused_before_the_start(photos: Path) -> None:
    (photos / "a.jpg").write_bytes((photos / "b.jpg").read_bytes())
    done = invoke("caption", "demo", str(photos), "-r", "--to", "txt", "-t", "1")
    assert isinstance(done.exception, InputError)
    assert "would be the same file as that of a.jpg" in str(done.exception)
    assert not list(photos.rglob("*.txt"))


@pytest.mark.skipif(sys.platform == "win32", reason="no signals to send")
@pytest.mark.slow
def test_ctrl_c_ends_after_the_running_picture(photos: Path) -> None:
    for k in range(300):
        scenes.scene(SEED + 100 + k).draw().save(photos / f"{k:03d}.bmp")
    command = [sys.executable, "-m", "pocketllava", "caption", "demo", str(photos), "-t", "1", "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "stopping after what is running" in err
    end = json.loads(out.splitlines()[-1])
    assert end["stopped"]
    assert len(rows(photos.parent / "photos.album")) < 300


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid"), reason="needs file limits")
def test_a_full_disk_is_one_line_and_the_album_is_whole(demo: Llava, photos: Path) -> None:
    caption(demo, photos)
    path = photos.parent / "test.album"
    before = rows(path)
    code = """
import resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
from pocketllava.album.journal import Album, Given, Picture, Question
with Album(Path(sys.argv[1])) as album:
    question = album.add_question(Question("q", "q", {}, "m", "m"))
    from pocketllava.album.database import database_errors
    with database_errors(album.path):
        for n in range(2000):
            album.put(album.add_picture(Picture(f"{n}.png", n, n, f"sha {n}")), question, Given("word " * 400))
"""
    limit = str(path.stat().st_size + 200_000)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), limit], capture_output=True, text=True, check=False
    )
    assert "InputError" in done.stderr.splitlines()[-1]
    assert "the album is whole" in done.stderr.splitlines()[-1]
    with sqlite3.connect(path) as opened:
        assert opened.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert [row for row in rows(path) if row in before] == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(photos: Path) -> None:
    photos.parent.chmod(0o500)
    try:
        done = invoke("caption", "demo", str(photos))
        assert isinstance(done.exception, InputError)
        assert "cannot be opened or made" in str(done.exception)
    finally:
        photos.parent.chmod(0o700)

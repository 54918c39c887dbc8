"""A conversation as state: what lines do to it, and its file. No model, no terminal."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pocketllava import ImageError, InputError, Message, PocketLlavaError, Timings
from pocketllava.chat.dialogue import Dialogue, Gallery, Picture
from pocketllava.chat.slash import COMMANDS, handle
from pocketllava.types import ImageSource
from pocketllava.vision.image import load

WINDOWS = os.name == "nt"


def examine(source: ImageSource) -> tuple[int, int]:
    """As `chat` examines images, without a model's preprocessing."""
    return load(source).size


TEXTS = st.text(st.characters(exclude_categories=("Cs",)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    """One in the folder "saved", one outside of it, one without a file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "saved" / "deeper").mkdir(parents=True)
    paths = [folder / "saved" / "deeper" / "im saved.png", folder / "ümläut.png"]
    for n, path in enumerate(paths):
        Image.new("RGB", (8 + n, 8), "blue").save(path)
    held = io.BytesIO()
    Image.new("RGB", (5, 5)).save(held, "WEBP")
    return [*map(Gallery(examine).open, paths), Picture(held.getvalue(), (5, 5))]


@given(
    st.lists(st.tuples(TEXTS, st.sets(st.integers(0, 2)), TEXTS), max_size=4),
    st.sets(st.integers(0, 2)),
    TEXTS,
)
def test_a_saved_conversation_comes_back(
    pictures: list[Picture], turns: list[tuple[str, set[int], str]], waiting: set[int], system: str
) -> None:
    one, other = Dialogue(Gallery(examine), "this one", system), Dialogue(Gallery(examine))
    for text, shown, answer in turns:
        one.add_answer(one.question(text, [pictures[n] for n in shown]), answer)
    one.attach([pictures[n] for n in waiting])
    folder = Path(str(pictures[0].path)).parent.parent
    one.save(folder / "chat.json")
    other.add_answer(other.question("gone"), "by then")
    assert other.load(folder / "chat.json") == "this one"
    assert (other.turns, other.waiting, other.system) == (one.turns, one.waiting, system)
    assert other.messages() == one.messages()
    assert [p.name for p in folder.iterdir() if p.is_file()] == ["chat.json"]


def test_images_are_saved_as_paths_while_they_are_the_same(here: Path) -> None:
    (here / "sub").mkdir()
    one = Dialogue(Gallery(examine))
    handle(one, "a.png b.PNG 'my photo.jpg'")
    (here / "b.PNG").write_bytes((here / "a.png").read_bytes())  # another screenshot of the same name
    handle(one, "/save chat.json")
    handle(one, "/save sub/chat.json")
    entries = json.loads((here / "chat.json").read_text("utf-8"))["waiting"]
    assert [e.get("path") for e in entries] == ["a.png", None, "my photo.jpg"]
    assert entries[1]["data"].startswith("data:image/png;base64,")
    entries = json.loads((here / "sub" / "chat.json").read_text("utf-8"))["waiting"]
    assert entries[0]["path"] == str(here / "a.png")
    moved = here.rename(here.with_name("moved"))
    other = Dialogue(Gallery(examine))
    other.load(moved / "chat.json")
    assert [p.data for p in other.waiting] == [p.data for p in one.waiting]


def damaged(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def damage(here: Path) -> None:
        found = json.loads((here / "chat.json").read_text("utf-8"))
        change(found)
        (here / "chat.json").write_text(json.dumps(found), "utf-8")

    return damage


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda here: (here / "a.png").unlink(), "a.png: cannot be read"),
        (
            lambda here: Image.new("RGB", (8, 8)).save(here / "a.png"),
            "a.png: changed since chat.json was saved",
        ),
        (lambda here: (here / "chat.json").write_text("{}"), "not a conversation that /save wrote"),
        (lambda here: (here / "chat.json").unlink(), "chat.json: cannot be read"),
        (
            lambda here: (here / "chat.json").write_text('{"pocketllava conversation"'),
            "chat.json: cannot be read",
        ),
        (damaged(lambda f: f.update(version=2)), "found version 2, expected 1"),
        (damaged(lambda f: f.pop("system")), "an incomplete conversation"),
        (damaged(lambda f: f["messages"].pop()), "roles do not alternate"),
        (damaged(lambda f: f["messages"][0].update(text=3)), "an incomplete conversation"),
        (damaged(lambda f: f["messages"][0].update(text="\ud800")), "an incomplete conversation"),
        (damaged(lambda f: f["messages"][0].update(images=[7])), "an incomplete conversation"),
    ],
)
def test_what_cannot_be_loaded_leaves_the_conversation(
    here: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    one = Dialogue(Gallery(examine), system="Be short.")
    one.add_answer(one.question("What?", [one.gallery.open("a.png")]), "That.")
    handle(one, "/save chat.json")
    before = one.messages()
    damage(here)
    with pytest.raises(PocketLlavaError, match=re.escape(complaint)) as raised:
        handle(one, "/load chat.json")
    assert "\n" not in str(raised.value)
    assert one.messages() == before


@pytest.mark.parametrize("name", ["a.png", "notes.json", ".", "nowhere/chat.json", "x" * 300, "nul\0"])
def test_only_our_own_files_are_written_over(here: Path, name: str) -> None:
    (here / "notes.json").write_text('{"mine": "pocketllava"}')
    before = {p.name: p.read_bytes() for p in here.iterdir()}
    with pytest.raises(InputError):
        handle(Dialogue(Gallery(examine)), f"/save {name}")
    assert {p.name: p.read_bytes() for p in here.iterdir()} == before


def test_a_question_that_failed_is_asked_again_first(here: Path) -> None:
    chat = Dialogue(Gallery(examine))
    with pytest.raises(InputError, match="no question yet"):
        handle(chat, "/retry")
    chat.add_answer(chat.question("First?"), "Yes.")
    lost = handle(chat, "Second? a.png").question
    assert lost
    chat.add_failure(lost)
    assert chat.messages() == [Message("user", "First?"), Message("assistant", "Yes.")]
    again = handle(chat, "/retry").question
    assert again == lost
    chat.add_answer(lost, "No.")
    last = handle(chat, "/retry").question
    assert last
    chat.add_answer(last, "Well.")
    assert [turn.answer for turn in chat.turns] == ["Yes.", "Well."]


def test_lines_that_begin_with_a_slash(here: Path) -> None:
    chat = Dialogue(Gallery(examine))
    asked = handle(chat, f"{here.as_posix()}/a.png what is this?").question if not WINDOWS else None
    assert WINDOWS or (asked and asked.turn.text == "what is this?" and len(asked.turn.pictures) == 1)
    literal = handle(chat, "//image ./c.png is what I typed").question
    assert literal
    assert literal.turn.text == "/image ./c.png is what I typed"
    for line, complaint in (
        ("/imgae a.png", "/imgae: no such command; did you mean /image?"),
        ("/xyzzy", "/xyzzy: no such command; /help lists them"),
        ("/nowhere/c.png what?", "/nowhere/c.png: no such file; the message was not sent"),
        ("/etc/hosts what?", "/etc/hosts: no image and no command"),
        ("/image c.png", "c.png: no such file"),
        ("/clear everything", "/clear: found 'everything'"),
        ("/load", "/load: expected a file's name"),
    ):
        with pytest.raises(InputError, match=re.escape(complaint)):
            handle(chat, line)
    with pytest.raises(ImageError):
        handle(chat, f"/image {Path(__file__).as_posix()}")
    assert chat.messages() == []
    assert all(
        name in "\n".join(handle(chat, "/help").lines) for name in COMMANDS if name not in ("exit", "bye")
    )


@pytest.mark.parametrize("line", ["exit", "Quit", "/bye", "/quit", "/exit", "  exit "])
def test_words_that_leave(line: str) -> None:
    assert handle(Dialogue(Gallery(examine)), line).leave
    assert handle(Dialogue(Gallery(examine)), f"What does {line} mean?").question


LINES = st.one_of(
    st.sampled_from(
        [
            *(
                "a.png",
                "b.PNG 'my photo.jpg'",
                "What is in a.png?",
                "./c.png",
                "Hello.",
                "",
                " ",
                "/image b.PNG",
            ),
            *(
                "/image",
                "/images",
                "/clear",
                "/clear images",
                "/retry",
                "/system Be short.",
                '/system ""',
                "/system",
            ),
            *(
                "/save one.json",
                "/load one.json",
                "/save",
                "/load",
                "/load a.png",
                "/save a.png",
                "/stats",
                "/help",
            ),
            *("/nonsense", "//twice", "/quit", "quit", "/bye"),
        ]
    ),
    st.text(max_size=20),
    st.builds("/{} {}".format, st.sampled_from(sorted({*COMMANDS} - {"save"})), st.text(max_size=10)),
)
ANSWERS = st.one_of(st.none(), TEXTS)


@given(st.lists(st.tuples(LINES, ANSWERS), max_size=25))
def test_any_lines_leave_a_conversation(pictures: list[Picture], lines: list[tuple[str, str | None]]) -> None:
    """Roles alternate, nothing but our errors is raised, and what fails changes nothing."""
    with tempfile.TemporaryDirectory() as folder, inside(folder):
        for name in ("a.png", "b.PNG", "my photo.jpg"):
            Path(name).write_bytes(pictures[len(name) % 2].data)
        chat = Dialogue(Gallery(examine))
        for line, answer in lines:
            before = chat.messages(), list(chat.waiting)
            try:
                question = handle(chat, line).question
            except PocketLlavaError:
                assert (chat.messages(), chat.waiting) == before
                continue
            if question:
                assert chat.messages(question)[-1].role == "user"
                (
                    chat.add_failure(question)
                    if answer is None
                    else chat.add_answer(question, answer, Timings())
                )
                assert answer is not None or (chat.messages(), chat.waiting) == before
            check(chat)


def check(chat: Dialogue) -> None:
    """What holds of every conversation."""
    messages = chat.messages()
    turns = messages[1:] if chat.system else messages
    assert [m.role for m in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert len(chat.pictures) == sum(len(m.images) for m in turns) + len(chat.waiting)
    if ahead := chat.to_prefill():
        shown = [i for m in [*messages, Message("user", "", ahead[0])] for i in m.images]
        assert [*(i for m in ahead[1] for i in m.images), *ahead[0]] == shown[: len(chat.pictures)]


class inside:  # noqa: N801 - contextlib.chdir, which is new in 3.11
    def __init__(self, folder: str) -> None:
        self._folder, self._before = folder, Path.cwd()

    def __enter__(self) -> None:
        os.chdir(self._folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)

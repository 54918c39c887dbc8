"""The album of `serve --album`: the search is `find`'s, and nothing of the disk but the album's pictures is given."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from albums import PROMPTS, album
from click.testing import CliRunner
from pictures import scene
from PIL import Image
from test_serve import KEY, URI, Server, running

from pocketllava import ImageError, InputError
from pocketllava.album import gallery as galleries
from pocketllava.album.gallery import Gallery, thumbnail
from pocketllava.album.journal import Album
from pocketllava.cli import cli
from pocketllava.serve.guard import Access

CAPTIONS = (
    "a red square at the left",
    "a blue star",
    "a red heart and a blue circle",
    "red, red, red",
    "nothing",
)
SEARCH = "/v1/album/search"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return album(tmp_path_factory.mktemp("album"), CAPTIONS, ("one", "seven"))


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[Server]:
    yield from running(Access(), gallery=Gallery(path))


def search(server: Server, **asked: Any) -> list[Any]:
    reply = server.post(SEARCH, asked)
    assert reply.status == 200, reply.data
    return reply.json["data"]


def found(*words: str) -> list[Any]:
    result = CliRunner().invoke(cli, ["find", *words, "--json"])
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("words", ["red", "blue -", '"red heart" OR star', "re*", "red NOT heart", "purple"])
def test_words_find_what_find_finds(server: Server, path: Path, words: str) -> None:
    hits = search(server, words=words)
    assert [(hit["path"], hit["caption"]) for hit in hits] == [
        (Path(row["path"]).name, row["caption"]) for row in found(str(path), words)
    ]


def test_likeness_is_that_of_find(server: Server, path: Path) -> None:
    hits = search(server, like=3)
    rows = found(str(path), "--like", str(path.parent / "photos" / "2.webp"))
    assert [hit["path"] for hit in hits] == [Path(row["path"]).name for row in rows]
    assert [hit["likeness"] for hit in hits] == pytest.approx([row["likeness"] for row in rows])
    assert hits[0]["path"] == "2.webp"


def test_a_picture_that_is_not_in_the_album_is_looked_at(server: Server) -> None:
    hits = search(server, image_url=URI)
    assert len(hits) == len(CAPTIONS)
    assert all(-1 <= hit["likeness"] <= 1 for hit in hits)


def test_columns_and_limits(server: Server) -> None:
    facts = server.get("/v1/album").json
    assert (facts["name"], facts["pictures"]) == ("photos", len(CAPTIONS))
    assert [column["question"] for column in facts["columns"]] == list(PROMPTS)
    assert [hit["path"] for hit in search(server)] == ["0.png", "1.jpg", "2.webp", "3.bmp", "4.gif"]
    assert [hit["caption"] for hit in search(server, column=2)] == ["one", "seven"]
    assert [hit["path"] for hit in search(server, words="seven")] == ["1.jpg"]
    assert len(search(server, limit=2)) == 2


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"words": '"open'}, "words"),
        ({"words": "x" * 1001}, "words"),
        ({"words": "("}, "words"),
        ({"words": "a", "like": 1}, "words"),
        ({"like": 99}, None),
        ({"like": -1}, "like"),
        ({"like": 2**70}, "like"),
        ({"column": 99}, None),
        ({"limit": 0}, "limit"),
        ({"limit": 201}, "limit"),
        ({"image_url": "file:///etc/passwd"}, "image_url"),
        ({"image_url": "data:image/png;base64,AAAA"}, None),
    ],
)
def test_what_cannot_be_searched_is_refused(
    server: Server, path: Path, asked: Any, param: str | None
) -> None:
    reply = server.post(SEARCH, asked)
    assert reply.status == 400
    assert param is None or reply.json["error"]["param"] == param
    assert str(path.parent) not in reply.data.decode()


def test_pictures_are_their_bytes_and_thumbnails_are_small(server: Server, path: Path) -> None:
    for number, name in enumerate(("0.png", "1.jpg", "2.webp", "3.bmp", "4.gif"), 1):
        picture = server.get(f"/v1/album/pictures/{number}")
        assert picture.data == (path.parent / "photos" / name).read_bytes()
        assert picture.headers["content-type"].startswith("image/")
        small = server.get(f"/v1/album/thumbnails/{number}")
        assert small.headers["content-type"] == "image/jpeg"
        assert max(Image.open(io.BytesIO(small.data)).size) <= 320
        again = server.get(f"/v1/album/thumbnails/{number}", if_none_match=small.headers["etag"])
        assert (again.status, again.data) == (304, b"")


@pytest.mark.parametrize(
    "number", ["0", "99", "-1", "1.0", "x", "%D9%A3", "9" * 30, "..%2f..%2fetc%2fpasswd", "%00", "0.png"]
)
def test_there_are_no_other_pictures(server: Server, number: str) -> None:
    for kind in ("pictures", "thumbnails"):
        assert server.get(f"/v1/album/{kind}/{number}").status == 404


def test_only_bytes_that_were_asked_about_are_given(tmp_path: Path) -> None:
    """An album names files; one that was changed, or that a stranger's album names, is not given."""
    path = album(tmp_path, CAPTIONS[:4])
    secret = tmp_path / "secret.png"
    scene(20, 20).save(secret)
    photos = tmp_path / "photos"
    (photos / "0.png").write_bytes(secret.read_bytes())
    (photos / "1.jpg").unlink()
    (photos / "2.webp").unlink()
    os.mkfifo(photos / "2.webp") if hasattr(os, "mkfifo") else None
    with sqlite3.connect(path) as database:
        database.execute("UPDATE pictures SET path = ? WHERE id = 4", (str(secret),))
    database.close()
    gallery = Gallery(path)
    for number in range(1, 5):
        with pytest.raises(InputError, match=f"^picture {number}: "):
            gallery.picture(number)
    assert {hit.path for hit in gallery.first(None, 9)} == {"0.png", "1.jpg", "2.webp", "secret.png"}


DAMAGED = (
    "UPDATE answers SET text = x'ff'",
    "UPDATE answers SET text = 1, mark = 2, error = NULL",
    "UPDATE pictures SET path = 5 WHERE id = 1",
    "UPDATE pictures SET path = x'00', sha256 = 7 WHERE id = 1",
    "UPDATE questions SET options = '{'",
    "UPDATE questions SET prompt = 3, model_sha256 = 4",
    "UPDATE features SET mean = x'01'",
    "UPDATE features SET mean = 'text', pixels = 9 WHERE id = 1",
    "DELETE FROM questions",
)


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_album_is_an_error(tmp_path: Path, damage: str) -> None:
    path = album(tmp_path, CAPTIONS[:2])
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute(damage)
    database.close()
    try:
        gallery = Gallery(path)
        works: list[Callable[[], Any]] = [
            gallery.facts,
            lambda: gallery.first(None, 9),
            lambda: gallery.by_words("red", None, 9),
            lambda: gallery.like(1, 9),
            lambda: gallery.picture(1),
        ]
        for work in works:
            with suppress(InputError):
                json.dumps(work(), default=lambda found: asdict(found) if is_dataclass(found) else str(found))  # type: ignore[arg-type]
    except InputError as error:
        assert str(error).startswith("photos.album: ")


def test_a_search_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(galleries, "SEARCH_S", -1.0)
    monkeypatch.setattr(galleries, "STEPS", 1)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"^photos.album: the search took too long"):
        Gallery(path)
    assert time.monotonic() - start < 5


def test_an_album_that_is_being_written_can_be_read(path: Path) -> None:
    with Album(path) as writer:
        writer.database.execute("BEGIN IMMEDIATE")
        assert len(Gallery(path).by_words("red", None, 9)) == 3
        writer.database.execute("ROLLBACK")


def test_thumbnails_of_odd_pictures() -> None:
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16", "CMYK", "F"):
        file = io.BytesIO()
        Image.new(mode, (1000, 30)).save(file, "TIFF")
        assert Image.open(io.BytesIO(thumbnail(file.getvalue()))).size == (320, 10)
    lying = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(400, 100).save(lying, "JPEG", exif=exif)
    assert Image.open(io.BytesIO(thumbnail(lying.getvalue()))).size == (80, 320)
    with pytest.raises(ImageError, match=r"^picture: "):
        thumbnail(b"<svg/>")


def test_without_an_album() -> None:
    for server in running(Access()):
        assert server.get("/v1/album").json["name"] is None
        reply = server.post(SEARCH, {"words": "red"})
        assert (reply.status, reply.json["error"]["param"]) == (400, "album")
        assert server.get("/v1/album/pictures/1").status == 404


def test_it_is_closed_by_default(path: Path) -> None:
    for server in running(Access(key=KEY), gallery=Gallery(path)):
        for route in ("/v1/album", "/v1/album/pictures/1", "/v1/album/thumbnails/1"):
            assert server.get(route).status == 401
            assert server.get(route, authorization=f"Bearer {KEY}").status == 200
            for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}):
                assert server.get(route, authorization=f"Bearer {KEY}", **headers).status == 403
        assert server.post(SEARCH, {"words": "red"}).status == 401


def test_the_command_takes_the_folder_or_the_file(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for given in ("photos", "photos.album", "other.txt"):
        (tmp_path / "other.txt").write_text("hello")
        result = CliRunner().invoke(cli, ["serve", "demo", "--port", "0", "--album", str(tmp_path / given)])
        assert result.exit_code == 1
        name = "other.txt" if given == "other.txt" else "photos.album"
        assert f"{name}: found " in f"{result.output}{result.exception}"

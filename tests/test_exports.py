"""What an album is exported as, read back by its real readers where they are installed (extra `exports`)."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from pocketllava import InputError
from pocketllava.album import export as exports
from pocketllava.album.export import Export
from pocketllava.album.exports import webdataset
from pocketllava.album.exports.captions import Report, Style
from pocketllava.album.exports.xmp import DC, RDF, document
from pocketllava.album.journal import Album, Given, Picture, Question

CAPTIONS = {
    "a.png": "A red <circle> & a \"star\"",
    "more/b.jpg": "Ein Käfer,\nzwei Zeilen",
    "more/c d.png": "雪の猫",
}  # fmt: skip
RECORD = json.dumps({"caption": "A red circle", "tags": ["red", "circle & co"]})


@pytest.fixture
def album(tmp_path: Path) -> Iterator[Album]:
    """Three captioned pictures, one that failed and one that was cut."""
    folder = tmp_path / "photos"
    with Album(tmp_path / "photos.album", root=str(folder)) as opened:
        question = opened.add_question(Question("Describe.", "Describe.", {}, "demo", "sha"))
        for n, (name, text) in enumerate(CAPTIONS.items()):
            record = RECORD if n == 0 else None
            put(opened, question, name, Given(text, record, 7, "stop", "", 0.5, None, f"pixels {n}"))
        put(opened, question, "broken.png", Given(error="a damaged image"))
        put(opened, question, "cut.png", Given("One. Two", None, 7, "length", "cut", 0.5, None, "pixels 9"))
        yield opened


def put(album: Album, question: Question, name: str, given: Given) -> None:
    path = album.file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    status, sha256 = path.stat(), hashlib.sha256(path.read_bytes()).hexdigest()
    picture = album.add_picture(Picture(name, status.st_size, status.st_mtime_ns, sha256))
    album.put(picture, question, given)


def write(album: Album, to: str, style: Style | None = None, **more: Any) -> Report:
    return exports.write(album, album.question(None), Export(to, style or Style(), **more))


def lines() -> dict[str, str]:
    return {name: " ".join(text.split()) for name, text in CAPTIONS.items()}


def originals(album: Album) -> dict[str, bytes]:
    return {
        path.as_posix(): path.read_bytes()
        for ext in ("png", "jpg")
        for path in Path(album.root).rglob(f"*.{ext}")
    }


def test_no_export_touches_a_picture(album: Album) -> None:
    before = originals(album)
    for to in exports.FORMATS:
        if to != "parquet":
            write(album, to)
    assert originals(album) == before


@pytest.mark.parametrize("to", ["txt", "caption"])
def test_sidecars_are_one_line_each(album: Album, to: str) -> None:
    report = write(album, to, Style(prefix="ohwx, ", suffix="!"))
    assert (report.written, dict(report.left_out)) == (3, {"failed": 1, "cut": 1})
    for name, text in lines().items():
        assert album.file(name).with_suffix(f".{to}").read_bytes() == f"ohwx, {text}!".encode()


def test_existing_sidecars_are_kept_unless_asked(album: Album) -> None:
    path = album.file("a.txt")
    path.write_text("mine\n")
    assert write(album, "txt").kept == 1
    assert path.read_text() == "mine\n"
    text = lines()["a.png"]
    for existing, expected in (("append", f"mine {text}"), ("overwrite", text)):
        for _ in range(2):  # the same command twice changes nothing more
            write(album, "txt", Style(existing=existing))  # type: ignore[arg-type]
            assert path.read_text("utf-8") == expected
    path.write_text("mine")
    write(album, "txt", Style(existing="prepend"))
    assert path.read_text("utf-8") == f"{text} mine"


def test_captions_that_were_cut_end_at_a_sentence_when_asked(album: Album) -> None:
    assert write(album, "txt", Style(sentence_end=True)).written == 4
    assert album.file("cut.txt").read_text() == "One."
    write(album, "txt", Style(marked=True, existing="overwrite"))
    assert album.file("cut.txt").read_text() == "One. Two"


def test_words_of_a_picture_around_its_caption(album: Album) -> None:
    album.file("a.caption").write_text("1girl,\n red hair")
    style = Style(prefix="{name} in {directory}, ", suffix=", {tags} {other}", existing="overwrite")
    for _ in range(2):  # tags are never those of the file that is written
        assert write(album, "txt", style).written == 3
        assert (
            album.file("a.txt").read_text() == f"a in photos, {lines()['a.png']}, 1girl, red hair {{other}}"
        )
        assert album.file("more/b.txt").read_text("utf-8") == f"b in more, {lines()['more/b.jpg']}, {{other}}"
    write(album, "metadata.csv", style)
    assert "a in photos, " in (Path(album.root) / "metadata.csv").read_text("utf-8")
    album.file("a.caption").write_bytes(b"\xff\xff\xff")
    report = write(album, "txt", style)
    assert (report.written, report.left_out["without tags that can be read"]) == (2, 1)
    assert "a.caption: cannot be read as tags" in report.remarks[0]


def test_a_picture_that_is_gone_gets_no_sidecar_and_is_in_nobodys_way(album: Album) -> None:
    put(album, album.question(None), "a.jpg", Given("other"))
    album.file("a.png").unlink()
    report = write(album, "txt")
    assert (report.written, report.left_out["gone"]) == (3, 1)
    assert album.file("a.txt").read_text() == "other"


def test_two_pictures_with_one_sidecar_are_refused(album: Album) -> None:
    put(album, album.question(None), "a.jpg", Given("other"))
    for to, more in (("txt", {}), ("xmp", {"naming": "stem"})):
        with pytest.raises(InputError, match=r"its caption would be the same file as that of a\.jpg"):
            write(album, to, **more)
    assert not album.file("a.txt").exists()
    write(album, "xmp")


def test_tables(album: Album) -> None:
    root = Path(album.root)
    write(album, "metadata.jsonl")
    entries = [json.loads(line) for line in (root / "metadata.jsonl").read_text("utf-8").splitlines()]
    assert {e["file_name"]: e["text"] for e in entries} == lines()
    write(album, "metadata.csv")
    with (root / "metadata.csv").open(encoding="utf-8", newline="") as file:
        assert {row["file_name"]: row["text"] for row in csv.DictReader(file)} == lines()
    write(album, "llava")
    talks = json.loads((root / "llava.json").read_text("utf-8"))
    assert {t["image"]: t["conversations"][1]["value"] for t in talks} == lines()
    assert {t["conversations"][0]["value"] for t in talks} == {"<image>\nDescribe."}
    write(album, "jsonl", target=root.parent / "all.jsonl")
    (first, *_) = map(json.loads, (root.parent / "all.jsonl").read_text("utf-8").splitlines())
    assert (
        first | {"path": "a.png", "json": RECORD, "tokens": 7, "finish_reason": "stop", "error": None}
        == first
    )
    with pytest.raises(InputError, match="exists; --existing overwrite"):
        write(album, "llava")
    with pytest.raises(InputError, match=r"outside .*, expected all pictures below the file"):
        write(album, "metadata.jsonl", target=root / "more" / "metadata.jsonl")
    assert not list((root / "more").glob("*metadata*"))


def test_webdataset_shards_as_tar(album: Album) -> None:
    write(album, "webdataset")
    with tarfile.open(Path(album.root) / "webdataset" / "00000.tar") as tar:
        names = tar.getnames()
        assert names[:3] == ["000000000.png", "000000000.txt", "000000000.json"]
        assert names[3] == "000000001.jpg"
        assert tar.extractfile("000000001.txt").read().decode() == lines()["more/b.jpg"]  # type: ignore[union-attr]
        assert tar.extractfile("000000001.jpg").read() == album.file("more/b.jpg").read_bytes()  # type: ignore[union-attr]


def test_a_sidecar_that_exists_is_left_alone_without_exiftool(
    album: Album, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = album.file("a.png.xmp")
    path.write_text("<somebody's/>")
    monkeypatch.setenv("PATH", "")
    assert write(album, "xmp").kept == 1
    report = write(album, "xmp", Style(existing="append"))
    assert report.remarks == [
        "3 sidecars that exist were left alone: only exiftool merges them, and it is not installed"
    ]
    assert path.read_text() == "<somebody's/>"


def test_xmp_is_the_caption_and_the_records_words(album: Album) -> None:
    write(album, "xmp")
    root = ET.fromstring(album.file("a.png.xmp").read_bytes())
    assert [e.text for e in root.iterfind(f".//{{{DC}}}description//{{{RDF}}}li")] == [lines()["a.png"]]
    assert [e.text for e in root.iterfind(f".//{{{DC}}}subject//{{{RDF}}}li")] == ["red", "circle & co"]
    assert ET.fromstring(document("a \0\x0b b", [])) is not None
    write(album, "xmp", naming="stem")
    assert album.file("more/b.xmp").exists()


# Real readers.


@pytest.mark.skipif(not shutil.which("exiftool"), reason="exiftool is not installed")
def test_exiftool_reads_and_merges(album: Album) -> None:
    path = album.file("a.png.xmp")
    write(album, "xmp")

    def read() -> dict[str, Any]:
        done = subprocess.run(["exiftool", "-j", "-XMP:all", str(path)], capture_output=True, check=True)
        entry: dict[str, Any] = json.loads(done.stdout)[0]
        return entry

    assert read()["Description"] == lines()["a.png"]
    assert read()["Subject"] == ["red", "circle & co"]
    subprocess.run(
        [
            "exiftool",
            "-q",
            "-overwrite_original",
            "-XMP:Rating=4",
            "-XMP:Subject=mine",
            "-XMP:Description=old",
            str(path),
        ],
        check=True,
    )
    one = next(album.rows(album.question(None)))
    with Export("xmp", Style(existing="overwrite")).beside(waits=True) as writer:
        for n in range(1, 3):  # at once
            writer.add(one)
            assert (writer.report.written, read()["Description"]) == (n, lines()["a.png"])
    for _ in range(2):
        assert write(album, "xmp", Style(existing="overwrite")).written == 3
        assert (read()["Rating"], read()["Description"]) == (4, lines()["a.png"])
        assert sorted(read()["Subject"]) == ["circle & co", "mine", "red"]


def test_datasets_reads_an_image_folder(
    album: Album, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    for name in ("broken.png", "cut.png"):
        album.file(name).unlink()
    write(album, "metadata.jsonl")
    loaded = datasets.load_dataset("imagefolder", data_dir=album.root, cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    assert sorted(loaded["text"]) == sorted(lines().values())
    assert all(image.size == (8, 8) for image in loaded["image"])


def test_pyarrow_and_datasets_read_parquet(album: Album, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write(album, "parquet", target=tmp_path / "c.parquet")
    table = parquet.read_table(tmp_path / "c.parquet").to_pylist()
    assert {row["path"]: row["caption"] for row in table} == lines()
    assert table[0]["json"] == RECORD
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "c.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert sorted(loaded["train"]["caption"]) == sorted(lines().values())


# webdataset itself leaves its files open
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_its_shards(album: Album) -> None:
    wds = pytest.importorskip("webdataset")
    write(album, "webdataset")
    shard = Path(album.root) / "webdataset" / "00000.tar"
    samples = list(wds.WebDataset(str(shard), shardshuffle=False).decode("pil"))
    assert sorted(sample["txt"] for sample in samples) == sorted(lines().values())
    assert {sample["json"]["caption"] for sample in samples} == set(lines().values())
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(shard.with_suffix(".parquet")).to_pylist()
    assert [(row["key"], row["caption"]) for row in table] == [(s["__key__"], s["txt"]) for s in samples]


def test_shards_of_a_larger_export_are_named(album: Album, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "SHARD", 1)
    folder = Path(album.root) / "webdataset"
    assert write(album, "webdataset").written == 3
    assert sorted(path.name for path in folder.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    with pytest.raises(InputError, match="exists; give --out a new folder"):
        write(album, "webdataset")
    for name in ("a.png", "more/b.jpg"):
        put(album, album.question(None), name, Given(error="gone"))
    report = write(album, "webdataset", Style(existing="overwrite"))
    assert report.written == 1
    assert re.fullmatch(
        r"00001\.(parquet, 00001\.)?tar, .*00002\.tar: of an earlier export, remove them", report.remarks[0]
    )

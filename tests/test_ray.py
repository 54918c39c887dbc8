"""The callable for Ray Data: rows in their order, a bad file a row with its error; and, with Ray, two actors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from pocketllava import InputError, Llava
from pocketllava.integrations.ray import Captioner, done_paths, picture_paths
from pocketllava.llamacpp.devices import cores
from pocketllava.models.demo import scenes

SEED = scenes.HELD_OUT_SEEDS.start + 3
EXAMPLE = Path(__file__).parent.parent / "examples" / "cluster" / "ray_captions.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k, name in enumerate(("a.png", "b.webp", "c.jpg")):
        scenes.scene(SEED + k).draw().save(pictures / name)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    scenes.scene(SEED + 3).draw().rotate(90).save(pictures / "turned.jpg", exif=exif, quality=95)
    (pictures / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    (pictures / "notes.txt").write_text("no picture")
    return pictures


def test_a_batch_of_bytes_becomes_captions_and_errors(folder: Path) -> None:
    files = [Path(path) for path in picture_paths(folder)]
    assert [file.name for file in files] == ["a.png", "b.webp", "bad.jpg", "c.jpg", "turned.jpg"]
    batch = {
        "path": np.array([str(f) for f in files]),
        "bytes": np.array([f.read_bytes() for f in files], object),
    }
    actors = max(1, cores() - 1)
    captioner = Captioner("demo", actors=actors, options={"max_tokens": 40})
    with captioner.llava.session() as session:
        assert session.text.n_threads == cores() // actors
    rows = captioner(batch)
    assert list(rows["path"]) == [str(f) for f in files]
    with Llava.load("demo") as llava:
        for file, caption, error in zip(files, rows["caption"], rows["error"], strict=True):
            if file.name == "bad.jpg":
                assert caption is None
                assert "image" in error
            else:
                assert (caption, error) == (llava.ask(file, "Describe the image.").text, None)
        upright = scenes.scene(SEED + 3).draw()
        assert rows["caption"][-1] == llava.ask(upright, "Describe the image.").text
    assert captioner({"path": [], "bytes": []}) == {}
    with pytest.raises(InputError, match="actors: found 0"):
        Captioner("demo", actors=0)


def test_paths_that_are_done_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    assert done_paths(tmp_path / "none") == set()
    for n in range(2):
        parquet.write_table(
            pa.table({"path": [f"{n}a", f"{n}b"], "caption": ["x", None]}), tmp_path / f"{n}.parquet"
        )
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "2.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3.parquet").touch()
    assert done_paths(tmp_path) == {"0a", "0b", "1a", "1b"}
    assert "2.parquet: cut short by a job that was killed" in caplog.text


def test_a_caption_holds_its_beginning(folder: Path) -> None:
    batch = {"path": ["a"], "bytes": [(folder / "a.png").read_bytes()]}
    rows = Captioner("demo", options={"prefill": "There is", "max_tokens": 4})(batch)
    assert rows["caption"][0].startswith("There is a ")


@pytest.mark.slow
def test_two_actors_and_a_second_run_that_goes_on(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    parquet = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "out"

    def run() -> str:
        command = [sys.executable, str(EXAMPLE), str(folder), str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "0 done, 5 to do" in run()
    scenes.scene(SEED + 9).draw().save(folder / "later.png")
    assert "5 done, 1 to do" in run()
    assert "6 done, 0 to do" in run()
    rows = [row for file in output.glob("*.parquet") for row in parquet.read_table(file).to_pylist()]
    captions = {Path(row["path"]).name: row["caption"] for row in rows}
    assert len(rows) == 6
    assert captions.pop("bad.jpg") is None
    with Llava.load("demo") as llava:
        for name, caption in captions.items():
            assert caption == llava.ask(folder / name, "Describe the image.").text

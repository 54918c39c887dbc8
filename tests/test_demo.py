"""The small trained model in the package: it sees, converted and quantized, whatever file a picture comes in."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from pictures import rotated
from PIL import Image

from pocketllava import Bundle, Llava, names
from pocketllava.cli import cli
from pocketllava.measure.accuracy import run, scene_items, summary
from pocketllava.models.demo import scenes

N_QUESTIONS = 100


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache folder of the tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    before = names.cache_folder
    names.cache_folder = lambda: folder
    yield folder
    names.cache_folder = before


@pytest.fixture(scope="module")
def demo(cache: Path) -> Any:
    """The Q4_K_M bundle, loaded by its name."""
    with Llava.load("demo") as llava:
        assert llava.bundle.folder.parent == cache
        yield llava


def test_it_answers_held_out_questions_in_q4_k_m(demo: Llava) -> None:
    table = summary(list(run(demo, scene_items(N_QUESTIONS), {})))
    print(f"\n{table}")
    assert table["accuracy"] >= 0.95


def test_scenes_are_the_same_everywhere() -> None:
    found = list(scenes.held_out(28))
    assert [qa.kind for _, qa in found[: len(scenes.KINDS)]] == list(scenes.KINDS)
    assert all(scene.seed in scenes.HELD_OUT_SEEDS for scene, _ in found)
    assert scenes.HELD_OUT_SEEDS.start >= scenes.TRAIN_SEEDS.stop
    assert list(scenes.held_out(10)) == found[:10]
    assert np.array_equal(np.asarray(found[0][0].draw()), np.asarray(scenes.scene(found[0][0].seed).draw()))


def variants(picture: Image.Image) -> dict[str, bytes]:
    """The same picture in other files."""

    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    frame = Image.new("RGBA", picture.size)
    frame.paste(picture)
    return {
        "turned by EXIF": rotated(picture.transpose(Image.Transpose.ROTATE_90), 6),
        "palette": saved(picture.quantize(256), "PNG"),
        "CMYK": saved(picture.convert("CMYK"), "TIFF"),
        "with an alpha channel": saved(frame, "PNG"),
        "JPEG": saved(picture, "JPEG", quality=90),
        "twice as large": saved(picture.resize((672, 672), Image.Resampling.BICUBIC), "PNG"),
    }


def test_other_files_of_a_picture_get_the_same_answers(demo: Llava) -> None:
    for seed in range(10_000_100, 10_000_104):
        scene = scenes.scene(seed)
        question = "What's the content of the image?"
        expected = demo.ask(scene.draw(), question).text
        for name, data in variants(scene.draw()).items():
            assert demo.ask(data, question).text == expected, (seed, name)


def test_the_demo_command(demo: Llava) -> None:
    shown = CliRunner().invoke(cli, ["demo"])
    assert shown.exit_code == 0
    assert shown.stdout.count("> ") == 5
    assert "picture: " in shown.stderr
    assert shown.stderr.count("tokens, ") == 5
    assert demo.bundle == Bundle.open(demo.bundle.folder)


def test_demo_is_a_name_for_ask_and_inspect() -> None:
    photo = str(Path(__file__).parent / "photo.jpg")
    asked = CliRunner().invoke(cli, ["ask", "demo", photo, "What color is the background?", "--json"])
    assert json.loads(asked.stdout)["finish_reason"] == "stop"
    assert "vision tower" in CliRunner().invoke(cli, ["inspect", "demo"]).stdout

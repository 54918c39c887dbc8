"""LLaVA-1.6: tiles, counts, features and answers, held to transformers' recorded results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import recorded
import tiled
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pocketllava import ContextOverflow, Llava, Message
from pocketllava.cli import cli
from pocketllava.engine.session import PrefillInterrupted
from pocketllava.models.preprocessing import Preprocessing
from pocketllava.models.tiling import MERGE_TYPES, TileLayout, Tiling
from pocketllava.prompt.items import ImageSpan
from pocketllava.vision.image_processor import ImageProcessor
from pocketllava.vision.tiles import pack


def digests(pinpoints: tuple[tuple[int, int], ...]) -> dict[str, str]:
    """SHA-256 of each picture's tiles, one behind the other."""
    processor = ImageProcessor(Preprocessing(tiling=tiled.tiling_of(pinpoints)), grid=24)
    return {
        name: hashlib.sha256(np.stack(processor.process(data).tiles).tobytes()).hexdigest()
        for name, data in tiled.many().items()
    }


@pytest.mark.parametrize("name", tiled.PINPOINT_SETS)
def test_token_counts_are_those_of_transformers(name: str) -> None:
    tiling = tiled.tiling_of(tiled.PINPOINT_SETS[name])
    counts = [tiling.layout(size, 336, 24).n_tokens for size in tiled.sizes()]
    assert counts == tiled.load()[f"token counts, {name}"]
    assert max(counts) <= tiling.most_tokens(336, 24)


@pytest.mark.parametrize("name", tiled.PINPOINT_SETS)
def test_tiles_have_the_pixels_of_transformers(name: str) -> None:
    assert digests(tiled.PINPOINT_SETS[name]) == tiled.load()[f"pixels, {name}"]


def test_a_size_is_counted_as_the_picture_is_prepared() -> None:
    """Turned pictures and arrays among them; a header is read, no picture is decoded."""
    tiling = tiled.tiling_of(tiled.PINPOINT_SETS["published"])
    sources: list[Any] = [*tiled.many().values(), np.zeros((40, 700), np.uint8), Image.new("RGB", (9, 400))]
    counts = [ImageProcessor(Preprocessing(tiling=tiling), grid=24).n_tokens(source) for source in sources]
    processor = ImageProcessor(Preprocessing(tiling=tiling), grid=24)
    assert [processor.process(source).n_tokens for source in sources] == counts
    assert [processor.n_tokens(source) for source in sources] == counts


@pytest.mark.parametrize("name", tiled.LAYOUTS)
def test_prompts_and_answers_are_those_of_transformers(make_bundle: Any, name: str) -> None:
    reference = tiled.load()
    answers, ties, prompts = (reference[f"{part}, {name}"] for part in ("answers", "ties", "prompts"))
    with Llava.load(make_bundle("F16", "F16", **tiled.LAYOUTS[name]).folder) as llava:
        for case, turns in tiled.CONVERSATIONS.items():
            conversation = tiled.messages(turns)
            with llava.session() as session:
                items, image_id = session.count(conversation), session.image_id
            ids = [
                i
                for item in items
                for i in ([image_id] * item.n_tokens if isinstance(item, ImageSpan) else [item])
            ]
            assert ids == [int(i) for i in prompts[case].split()], case
            answer = llava.chat(conversation, max_tokens=tiled.N_TOKENS)
            assert answer.usage.prompt_tokens == len(ids)
            recorded.assert_equal_or_tie(list(answer.token_ids), answers[case], ties[case])


def test_features_are_those_of_transformers(make_bundle: Any) -> None:
    with Llava.load(make_bundle("F16", "F16", **tiled.LAYOUTS["Vicuna"]).folder) as llava:
        features = llava.image_features(pictures.twelve()["landscape"])
    assert recorded.relative_error(features[tiled.FEATURE_ROWS], tiled.features()) <= 1e-3


EDGES = st.integers(1, 6000)
GRIDS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5)


@given(size=st.tuples(EDGES, EDGES), tiles=GRIDS, merge=st.sampled_from(MERGE_TYPES), grid=st.integers(1, 4))
def test_a_layout_of_any_picture(size: tuple[int, int], tiles: list[Any], merge: str, grid: int) -> None:
    """It lies inside one of the resolutions, centered, and its count is that of the packed features."""
    side = 14 * grid
    tiling = Tiling(tuple((columns * side, rows * side) for columns, rows in tiles), merge)
    layout = tiling.layout(size, side, grid)
    assert layout.resolution in tiling.pinpoints
    (width, height), (left, top) = layout.scaled, layout.corner
    assert width == layout.resolution[0] or height == layout.resolution[1]
    assert 0 <= left <= layout.resolution[0] - width - left <= left + 1
    assert 0 <= top <= layout.resolution[1] - height - top <= top + 1
    first, last, start, end = layout.patches
    assert 0 <= first <= last <= layout.rows * grid
    assert 0 <= start <= end <= layout.columns * grid
    assert layout.n_tokens <= tiling.most_tokens(side, grid)
    numbered = numbered_tiles(layout)
    newline = np.full(2, -1, np.float32)
    packed = pack(numbered, layout, newline)
    assert packed.shape == (layout.n_tokens, 2)
    assert packed[:, 0].tolist() == packed_by_hand(layout, merge)


def numbered_tiles(layout: TileLayout) -> list[Any]:
    """Features (grid * grid, 2) of each tile; the first column counts all patches."""
    n = layout.grid**2
    return [
        np.stack([np.arange(k * n, (k + 1) * n), np.zeros(n)], axis=1).astype(np.float32)
        for k in range(layout.n_tiles)
    ]


def packed_by_hand(layout: TileLayout, merge: str) -> list[float]:
    """The numbers in their order, patch by patch; -1 is the newline."""
    n, grid = layout.grid**2, layout.grid
    if merge == "flat":
        return [float(k) for k in range(layout.n_tiles * n)]
    order = [float(k) for k in range(n)]
    first, last, start, end = layout.patches
    for y in range(first, last):
        for x in range(start, end):
            tile = 1 + y // grid * layout.columns + x // grid
            order.append(float(tile * n + y % grid * grid + x % grid))
        order += [-1.0] * (merge == "spatial_unpad")
    return order


@pytest.fixture(scope="module")
def vicuna(make_bundle: Any) -> Iterator[Llava]:
    """A small LLaVA-1.6."""
    with Llava.load(make_bundle("F16", "F16", **tiled.LAYOUTS["Vicuna"]).folder) as llava:
        yield llava


def afresh(llava: Llava, source: Any) -> Any:
    """A picture's features without any memory of tiles."""
    with llava.session() as session:
        image = session.images.process(source)
        return pack([session.vision.encode(t) for t in image.tiles], image.layout, session.vision.newline)


def test_pictures_that_share_tiles_are_told_apart(vicuna: Llava) -> None:
    """One color in several sizes: the same base, other padding, or the very same tiles in another layout."""
    red = [Image.new("RGB", size, "red") for size in ((100, 50), (100, 40), (100, 44), (40, 100), (50, 100))]
    with vicuna.session() as session:
        images = [session.images.process(picture) for picture in red]
    assert len({image.tile_keys[0] for image in images}) == 1
    assert len({image.key for image in images}) == len(images)
    for picture in (*red, *reversed(red)):
        assert np.array_equal(vicuna.image_features(picture), afresh(vicuna, picture))


def test_a_tile_is_encoded_once(vicuna: Llava) -> None:
    one_color = Image.new("RGB", (112, 112), "teal")
    before = encoded(vicuna)
    vicuna.image_features(one_color)
    assert encoded(vicuna) == before + 1  # of five equal tiles
    vicuna.image_features(Image.new("RGB", (112, 56), "teal"))
    assert encoded(vicuna) == before + 1


def encoded(llava: Llava) -> int:
    """Tiles that went through the vision tower."""
    with llava.session() as session:
        return session.vision.correction.corrected


def test_encoding_stops_between_tiles(vicuna: Llava) -> None:
    question = [Message("user", "What is it?", pictures.png(pictures.scene(110, 110, 77)))]
    before = encoded(vicuna)
    with vicuna.session() as session, pytest.raises(PrefillInterrupted):
        session.prefill(question, should_stop=lambda: session.vision.correction.corrected >= before + 2)
    assert encoded(vicuna) == before + 2
    assert vicuna.chat(question, max_tokens=4).text == vicuna.chat(question, max_tokens=4).text
    assert encoded(vicuna) == before + 6  # the second was stopped inside, the first stays remembered


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (3, 5), (57, 1999), (1400, 1999)])
def test_pictures_of_any_size(vicuna: Llava, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, "navy")
    with vicuna.session() as session:
        count = session.images.n_tokens(picture)
    assert vicuna.image_features(picture).shape == (count, 256)
    assert 16 <= count <= 16 + 8 * 9


def test_a_context_that_is_too_small_is_said_before_anything_is_encoded(make_bundle: Any) -> None:
    bundle = make_bundle("F16", "F16", **tiled.LAYOUTS["Vicuna"])
    four = [pictures.png(pictures.scene(110, 110 - n, n)) for n in range(4)]
    wide = pictures.twelve()["wide"]
    with Llava.load(bundle.folder, n_ctx=256) as llava:
        with pytest.raises(ContextOverflow) as caught:
            llava.ask([wide, *four], "Compare them.")
        assert encoded(llava) == 0
        counts = caught.value.image_tokens
        assert counts == (42, 88, 88, 88, 88)
        assert f"its 5 images take 42 + 88 + 88 + 88 + 88 = {sum(counts)};" in str(caught.value)
        fitting = caught.value.fitting
        assert f"load with n_ctx={fitting} (--ctx {fitting})" in str(caught.value)
        fewer = caught.value.fitting_image_tokens
        assert f"show each image by image_tokens={fewer} (--image-tokens {fewer})" in str(caught.value)
        assert llava.ask([wide, *four], "Compare them.", max_tokens=2, image_tokens=fewer).text is not None
        with pytest.raises(
            ContextOverflow, match=r"its 46 images take 4048; .* the model was trained on no context"
        ):
            llava.ask([four[0]] * 46, "Compare them. " + "word " * 100)
    with Llava.load(bundle.folder, n_ctx=fitting) as llava:
        assert (
            llava.ask([wide, *four], "Compare them.", max_tokens=2).usage.prompt_tokens == caught.value.needed
        )


def test_inspect_shows_the_tiling(make_bundle: Any) -> None:
    bundle = make_bundle("F16", "F16", **tiled.LAYOUTS["Vicuna"])
    shown = CliRunner().invoke(cli, ["inspect", str(bundle.folder)]).output
    assert "tiles of a picture fitted to 112 x 56, 56 x 112, 112 x 112, 56 x 168, 168 x 56 pixels" in shown
    assert "spatial_unpad" in shown
    assert "v.image_newline 256 F32" in shown


def test_inspect_follows_a_tiled_picture(make_bundle: Any, tmp_path: Path) -> None:
    bundle = make_bundle("F16", "F16", **tiled.LAYOUTS["Vicuna"])
    photo = tmp_path / "wide.png"
    photo.write_bytes(pictures.twelve()["landscape"])
    done = CliRunner().invoke(cli, ["inspect", str(bundle.folder), "--image", str(photo)])
    assert done.exit_code == 0, done.output
    assert "the whole picture as one tile, and 2 x 2 tiles" in done.output
    assert "6 x 8 patches without padding: 70 image tokens, 16 of them the whole picture's" in done.output
    assert "-> projector (70, 256)" in done.output
    assert "are the image features" in done.output
    fields = json.loads(
        CliRunner().invoke(cli, ["inspect", str(bundle.folder), "--image", str(photo), "--json"]).output
    )
    assert (fields["tiles"], fields["unpadded"], fields["embeddings_match"]) == ([2, 2], [6, 8], True)

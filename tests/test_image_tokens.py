"""Fewer image tokens: SCOPE's selection, what it is kept under, and that all of them change nothing."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import Llama
from PIL import Image

from pocketllava import BackendError, Bundle, InputError, Llava, Message, UnsupportedOption
from pocketllava.cli import cli
from pocketllava.integrations.llama_cpp import LlavaChatHandler
from pocketllava.models.tiling import Tiling
from pocketllava.vision.last_block import LastBlock
from pocketllava.vision.selection import budgets, n_selected, scope_order, select

A, B = pictures.four()[:2]
QUESTION = "What is it?"


def data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def plain(attention: Any, hidden: Any, n: int) -> list[int]:
    """The formula as it is written, without a heap."""
    unit = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    similarity, covered, order = unit @ unit.T, np.zeros(len(unit), np.float32), []
    for _ in range(n):
        gains = attention * np.maximum(0, similarity - covered[:, None]).sum(axis=0)
        gains[order] = -1
        order.append(int(np.argmax(gains)))
        covered = np.maximum(covered, similarity[:, order[-1]])
    return order


@given(st.integers(1, 60), st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_the_lazy_order_is_the_plain_formulas(n: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    attention = rng.random(n, np.float32) + np.float32(0.01)
    hidden = rng.standard_normal((n, width), np.float32)
    order = scope_order(attention, hidden).tolist()
    assert sorted(order) == list(range(n))
    first = plain(attention, hidden, min(n, width))  # once all is covered, gains are rounding
    assert order[: len(first)] == first or gains_tie(attention, hidden, order, first)


def gains_tie(attention: Any, hidden: Any, order: list[int], expected: list[int]) -> bool:
    """Whether two orders part where the gains of both choices are equal within rounding."""
    at = next(i for i, (a, b) in enumerate(zip(order, expected, strict=False)) if a != b)
    unit = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    similarity = unit @ unit.T
    covered = similarity[expected[:at]].max(axis=0, initial=0)
    a, b = (attention[j] * np.maximum(0, similarity[j] - covered).sum() for j in (order[at], expected[at]))
    return bool(abs(a - b) <= 1e-4 * max(1.0, a, b))


@given(st.integers(1, 3000), st.lists(st.integers(0, 576), min_size=1, max_size=10))
def test_a_budget_is_spent_evenly_and_whole(n: int, candidates: list[int]) -> None:
    shares = budgets(n, candidates)
    assert sum(shares) == min(n, sum(candidates))
    assert all(share <= most for share, most in zip(shares, candidates, strict=True))
    unfilled = [share for share, most in zip(shares, candidates, strict=True) if share < most]
    assert not unfilled or max(shares) - min(unfilled) <= 1


@given(st.integers(1, 700), st.integers(20, 3000), st.integers(20, 3000))
def test_selected_rows_are_picture_in_raster_order(n: int, width: int, height: int) -> None:
    side, grid = 28, 2
    tiling = Tiling(((28, 56), (56, 28), (56, 56)))
    layout = tiling.layout((width, height), side, grid)
    orders = []
    for top, bottom, left, right in layout.boxes:
        patches = np.arange(grid * grid).reshape(grid, grid)[top:bottom, left:right].ravel()
        orders.append(np.random.default_rng(n).permutation(patches).astype(np.int16))
    # each row names its place: tile, row and column on the whole grid
    tiles = [
        np.array([[t, *divmod(p, grid)] for p in range(grid * grid)], np.float32)
        for t in range(layout.n_tiles)
    ]
    for t, tile in enumerate(tiles[1:]):
        row, column = divmod(t, layout.columns)
        tile[:, 1:] += (row * grid, column * grid)
        tile[:, 0] = 1
    count = n_selected(layout.n_tokens, layout, n)
    if count == layout.n_tokens:
        return
    rows = select(tiles, orders, layout, count)
    assert len(rows) == count == min(n, sum(layout.candidates))
    assert rows.tolist() == sorted(rows.tolist())
    top, bottom, left, right = layout.patches
    on_grid = rows[rows[:, 0] == 1]
    assert ((on_grid[:, 1] >= top) & (on_grid[:, 1] < bottom)).all()
    assert ((on_grid[:, 2] >= left) & (on_grid[:, 2] < right)).all()


def test_the_choice_follows_the_formula_on_the_towers_own_tensors(llava: Llava) -> None:
    with llava.session() as session:
        pixels = session.images.process(A).tiles[0]
        features, order = session.vision.encode_ranked(pixels, (0, 24, 0, 24))
        tower = session.vision.correction
        expected = plain(tower.attention(), tower.hidden(), 192)
    assert order[:192].tolist() == expected
    assert np.array_equal(features, llava.image_features(A))
    for n in (192, 64, 1):
        assert np.array_equal(llava.image_features(A, image_tokens=n), features[np.sort(expected[:n])])


def test_all_tokens_are_the_default_to_the_last_bit(llava: Llava) -> None:
    expected = llava.ask(A, QUESTION, max_tokens=12)
    for n in (576, 577, 10**6):
        answer = llava.ask(A, QUESTION, max_tokens=12, image_tokens=n)
        assert answer.token_ids == expected.token_ids
        assert answer.usage.image_tokens == answer.timings.all_image_tokens == 576
    assert np.array_equal(llava.image_features(A, image_tokens=576), llava.image_features(A))


def test_another_number_is_another_picture(llava: Llava, make_bundle: Any) -> None:
    counts = (None, 128, 64, None, 64, 128)
    answers = [llava.ask(A, QUESTION, max_tokens=8, image_tokens=n) for n in counts]
    assert [a.usage.image_tokens for a in answers] == [576, 128, 64, 576, 64, 128]
    assert answers[1].token_ids == answers[5].token_ids
    assert answers[2].token_ids == answers[4].token_ids
    with Llava.load(make_bundle().folder, image_tokens=64) as other:  # what nothing was cached for
        fresh = other.ask(A, QUESTION, max_tokens=8)
        assert fresh.token_ids == answers[2].token_ids
        assert fresh.timings.all_image_tokens == 576
        assert other.count_tokens([Message(text=QUESTION, images=A)]) == fresh.usage.prompt_tokens
        assert other.ask(A, QUESTION, max_tokens=8, image_tokens=576).token_ids == answers[0].token_ids


def test_the_order_is_kept_on_disk(make_bundle: Any, tmp_path: Path) -> None:
    folder = make_bundle().folder
    with Llava.load(folder, cache_dir=tmp_path) as llava:
        llava.ask(B, QUESTION, max_tokens=2)  # features without an order are encoded once more
        assert llava.ask(B, QUESTION, max_tokens=2, image_tokens=100).timings.encode_s > 0
        expected = llava.image_features(B, image_tokens=7)
    with Llava.load(folder, cache_dir=tmp_path) as llava, llava.session() as session:
        corrected = session.vision.correction.corrected
        assert np.array_equal(session.image_features(B, image_tokens=7), expected)
        assert session.vision.correction.corrected == corrected  # nothing was encoded
        for path in tmp_path.glob("*.order*"):
            path.write_bytes(path.read_bytes()[:-2])
    with Llava.load(folder, cache_dir=tmp_path) as llava:
        assert np.array_equal(llava.image_features(B, image_tokens=7), expected)


def test_a_prepared_image_helps_the_same_number_only(llava: Llava) -> None:
    llava.clear_cache()
    assert llava.prefill(A, image_tokens=32).wait()
    assert llava.ask(A, QUESTION, max_tokens=2, image_tokens=32).usage.cached_tokens >= 32
    assert llava.ask(A, QUESTION, max_tokens=2, image_tokens=33).usage.cached_tokens < 32


def test_tiled_pictures_share_their_tokens_among_tiles(make_bundle: Any) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (427, 640, 3), np.uint8))
    with Llava.load(make_bundle(tiled=True, layers=1).folder) as llava:
        whole = llava.image_features(picture)
        few = llava.image_features(picture, image_tokens=320)
        assert (len(whole), len(few)) == (2144, 320)
        rows = {row.tobytes() for row in whole}
        assert all(row.tobytes() in rows for row in few)  # of the picture, and no newline twice
        assert len({row.tobytes() for row in few}) == 320
        trace = llava.trace(picture, QUESTION, image_tokens=320)
        assert trace.embeddings_match
        assert trace.feature_shape == (320, 256)
        assert llava.view(picture, image_tokens=320).size == (672 * 3 + 16, 672 * 2)


def test_a_tower_without_a_class_token_takes_the_attention_received(make_bundle: Any) -> None:
    with Llava.load(make_bundle(siglip=True, layers=1).folder) as llava:
        features, few = llava.image_features(A), llava.image_features(A, image_tokens=100)
        assert few.shape == (100, 256)
        assert {row.tobytes() for row in few} <= {row.tobytes() for row in features}


def test_a_graph_without_these_nodes_is_an_error() -> None:
    tower = LastBlock(np.empty(0, np.float32), 4, block=99, n_heads=2, width=8)
    tower.begin()
    with pytest.raises(BackendError, match="no node Qcur in the vision tower's last block"):
        tower.attention()
    with pytest.raises(BackendError, match="no node layer_out"):
        tower.hidden()


def test_the_handler_takes_it(bundle: Bundle) -> None:
    handler = LlavaChatHandler(bundle.folder, image_tokens=50)
    llama = Llama(str(bundle.model), chat_handler=handler, n_ctx=1024, n_batch=1024, verbose=False)
    image = {"type": "image_url", "image_url": {"url": data_uri(A)}}
    content = [image, {"type": "text", "text": QUESTION}]
    completion: Any = llama.create_chat_completion([{"role": "user", "content": content}], max_tokens=2)  # type: ignore[list-item]
    assert completion["usage"]["prompt_tokens"] < 100
    handler.close()
    llama.close()


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True])
def test_what_is_no_number_of_tokens(llava: Llava, bundle: Bundle, value: Any) -> None:
    with pytest.raises(InputError, match="image_tokens: found"):
        llava.ask(A, QUESTION, image_tokens=value)
    with pytest.raises(UnsupportedOption, match="image_tokens: found"):
        Llava.load(bundle.folder, image_tokens=value)
    with pytest.raises(InputError, match="image_tokens: found"):
        llava.prefill(A, image_tokens=value)


def test_the_command_line(bundle: Bundle, tmp_path: Path) -> None:
    path, drawn = tmp_path / "a.png", tmp_path / "seen.png"
    path.write_bytes(A)
    command = ["ask", str(bundle.folder), str(path), QUESTION, "-n", "2", "--image-tokens", "128"]
    done = CliRunner().invoke(cli, command)
    assert "128 of 576 image tokens" in done.stderr
    done = CliRunner().invoke(cli, [*command, "--json"])
    timings = json.loads(done.stdout)["timings"]
    assert (timings["image_tokens"], timings["all_image_tokens"]) == (128, 576)
    command = [
        "inspect",
        str(bundle.folder),
        "--image",
        str(path),
        "--image-tokens",
        "128",
        "--save",
        str(drawn),
    ]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert "projector (128, 256)" in done.stdout
    with Image.open(drawn) as seen:
        assert seen.size == (672, 672)
        tiles = np.asarray(seen, np.float32).reshape(24, 28, 24, 28, 3).mean(axis=(1, 3, 4))
    with Llava.load(bundle.folder) as llava:
        full = np.asarray(llava.view(path), np.float32).reshape(24, 28, 24, 28, 3).mean(axis=(1, 3, 4))
    assert int((tiles > 0.5 * full).sum()) == 128
    done = CliRunner().invoke(cli, [*command[:-1], str(tmp_path / "nowhere" / "x.png")])
    assert done.exit_code == 1

"""LLaVA-1.6's checkpoints and files: both layouts, their keys and conversations, what is refused, repaired and noted."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import tiled
from click.testing import CliRunner
from gguf import GGUFValueType as V
from small_checkpoint import dump, write
from test_original import CONVERSATIONS, changed, rendered, tensors_of
from test_repair import hub_file, rewritten

from pocketllava import BundleError, ConvertError, Llava, TensorMismatch, UnsupportedCheckpoint
from pocketllava.cli import cli
from pocketllava.convert.pipeline import plan
from pocketllava.convert.repair import examine, repair
from pocketllava.integrations.llama_cpp import LlavaChatHandler
from pocketllava.models.gguf_header import Header
from pocketllava.models.mmproj_contract import NEWLINES, PINPOINTS, check_mmproj

ORIGINAL = {"naming": "original", "aspect": "anyres"}
Turn = tuple[str, str, int]


def test_the_layouts_of_one_model_have_the_same_tensors(make_bundle: Any) -> None:
    """Hub names old and new, the original's, and LLaVA-1.5's without tiles: byte for byte."""
    changes = {**tiled.SMALL, "seed": 21}
    first, *others = (make_bundle("F16", "F16", **changes, naming=name) for name in ("old", "new", "newest"))
    original = make_bundle("F16", "F16", **changes, **ORIGINAL)
    text, vision = tensors_of(first.model), tensors_of(first.mmproj)
    for bundle in others:
        assert tensors_of(bundle.model) == text
    for bundle in (*others, original):
        assert tensors_of(bundle.mmproj) == vision
        assert bundle.preprocessing == first.preprocessing
    for name, data in tensors_of(original.model).items():  # the hub's vocabulary has rows more, at its end
        assert text[name][: len(data)] == data, name
    flat = make_bundle("F16", "F16", **{**changes, "tiled": False})
    assert tensors_of(flat.model) == text
    assert vision.pop("v.image_newline")
    assert vision == tensors_of(flat.mmproj)


def test_keys_of_the_mmproj(make_bundle: Any) -> None:
    keys = Header.read(make_bundle("F16", "F16", **tiled.SMALL, seed=21).mmproj).keys
    sizes = [edge for height, width in tiled.SMALL["pinpoints"] for edge in (width, height)]
    assert keys[PINPOINTS] == sizes
    assert keys["clip.vision.mm_patch_merge_type"] == "spatial_unpad"
    assert keys["clip.vision.image_aspect_ratio"] == "anyres"


@pytest.mark.parametrize(
    ("changes", "merge"),
    [
        ({}, "spatial_unpad"),
        ({"mm_patch_merge_type": "spatial"}, "spatial"),
        ({"mm_patch_merge_type": "flat"}, "flat"),
        ({"mm_patch_merge_type": None}, "flat"),
        ({"image_grid_pinpoints": "[(112, 56), [56,112]]"}, "spatial_unpad"),
        ({"image_aspect_ratio": "pad"}, None),
        ({"image_aspect_ratio": "square"}, None),
        ({"image_aspect_ratio": None}, None),
    ],
    ids=str,
)
def test_what_the_originals_keys_say(
    make_checkpoint: Any, tmp_path: Path, changes: dict[str, Any], merge: str | None
) -> None:
    """Without anyres pictures are prepared as LLaVA-1.5's, whatever else a config.json of 1.6 holds."""
    planned = plan(changed(make_checkpoint(**tiled.SMALL, **ORIGINAL, seed=21), tmp_path, **changes))
    prepared, names = planned.opened.preprocessing, {t.name for t in planned.mmproj.tensors}
    assert (prepared.tiling and prepared.tiling.merge) == merge
    assert prepared.pad_to_square == (changes.get("image_aspect_ratio") == "pad")
    assert ("v.image_newline" in names) == (merge == "spatial_unpad")
    assert ("model.image_newline" in planned.dropped) == (merge != "spatial_unpad")
    if prepared.tiling is not None and changes.get("image_grid_pinpoints"):
        assert prepared.tiling.pinpoints == ((112, 56), (56, 112))


def test_merging_of_other_kinds(make_checkpoint: Any, tmp_path: Path) -> None:
    """ "flat" is one tile behind the other, "spatial" the grid's rows of patches; neither has newlines."""
    from pocketllava.convert import convert

    source, data = make_checkpoint(**tiled.SMALL, **ORIGINAL, seed=21), pictures.twelve()["portrait"]
    found = {}
    for merge in ("flat", "spatial"):
        folder = changed(source, tmp_path / merge, mm_patch_merge_type=merge)
        with Llava.load(convert(folder, tmp_path / f"{merge} bundle", quant="F16").folder) as llava:
            found[merge] = llava.image_features(data)
            with llava.session() as session:
                image = session.images.process(data)
                assert session.images.n_tokens(data) == image.n_tokens == len(found[merge])
                tiles = [session.vision.encode(tile) for tile in image.tiles]
            assert np.array_equal(found["flat"], np.concatenate(tiles))
    layout = image.layout
    assert layout is not None
    assert (layout.rows, layout.columns) == (2, 2)
    rows = found["flat"][16:].reshape(2, 2, 4, 4, -1).transpose(0, 2, 1, 3, 4).reshape(64, -1)
    assert np.array_equal(found["spatial"], np.concatenate([found["flat"][:16], rows]))


def chatml(turns: list[Turn]) -> str:
    """Conversation.get_prompt with conv_chatml_direct."""
    prompt = "" if turns[0][0] == "system" else "<|im_start|>system\nAnswer the questions.<|im_end|>"
    for role, text, n in turns:
        prompt += f"<|im_start|>{role}\n" + "<image>\n" * n + f"{text}<|im_end|>"
    return prompt + "<|im_start|>assistant\n"


def llama_3(turns: list[Turn]) -> str:
    """Meta's template over conv_llava_llama_3's messages."""
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the"
        " user provides, and assist the user with a variety of tasks using natural language."
    )
    prompt = "<|begin_of_text|>"
    for role, text, n in [*([] if turns[0][0] == "system" else [("system", system, 0)]), *turns]:
        content = ("<image>\n" * n + text).strip()
        prompt += f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
    return prompt + "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize(("name", "expected"), [("ChatML", chatml), ("Llama 3", llama_3)])
def test_the_originals_conversations(
    make_bundle: Any, name: str, expected: Callable[[list[Turn]], str]
) -> None:
    bundle = make_bundle("F16", "F16", **{**tiled.LAYOUTS[name], **ORIGINAL})
    with Llava.load(bundle.folder) as llava:
        for turns in (*CONVERSATIONS.values(), [("system", "Be brief.", 0), ("user", "Hi", 0)]):
            assert rendered(llava, turns) == expected(turns)
        assert bundle.space_prefix == "none"


def test_the_originals_features_are_the_hubs(make_bundle: Any) -> None:
    features = []
    for changes in ({}, ORIGINAL):
        bundle = make_bundle("F16", "F16", **{**tiled.LAYOUTS["Vicuna"], **changes})
        with Llava.load(bundle.folder) as llava:
            features.append(llava.image_features(pictures.twelve()["wide"]))
    assert np.array_equal(*features)


def test_ties_follow_the_checkpoints_order(make_checkpoint: Any) -> None:
    """The same list of numbers is (height, width) at the hub, and (width, height) in the original code."""
    numbers = ((56, 112), (112, 56))
    hub = plan(make_checkpoint(**{**tiled.SMALL, "pinpoints": numbers}))
    swapped = tuple((width, height) for height, width in numbers)
    original = plan(make_checkpoint(**{**tiled.SMALL, **ORIGINAL, "pinpoints": swapped}))
    square = (50, 50)
    best = [p.opened.preprocessing.tiling.best(square) for p in (hub, original)]  # type: ignore[union-attr]
    assert best == [(112, 56), (56, 112)]


def test_mistral_has_no_window(make_checkpoint: Any, make_bundle: Any) -> None:
    bundle = make_bundle("F16", "F16", **tiled.LAYOUTS["Mistral"])
    assert Header.read(bundle.model).keys["llama.rope.freq_base"] == 1e6
    folder = make_checkpoint(**tiled.LAYOUTS["Mistral"])
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"max_position_embeddings": 32768}
    from pocketllava.convert.read.config import LlavaConfig

    assert LlavaConfig.from_json({**config, "text_config": text}).text.n_ctx == 32768
    del text["sliding_window"]  # MistralConfig's default then counts
    assert LlavaConfig.from_json({**config, "text_config": text}).text.n_ctx == 4096


def test_an_early_revisions_end_is_put_right(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(make_checkpoint(**tiled.LAYOUTS["Mistral"]), tmp_path / "checkpoint")
    right = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    for wrong in ("<\\s>", "<\\\\s>"):
        dump(folder / "chat_template.json", {"chat_template": right.replace("</s>", wrong)})
        planned = plan(folder)
        assert planned.opened.template == right
        assert ["<\\s>" in remark for remark in planned.remarks] == [True]
    done = CliRunner().invoke(cli, ["convert", str(folder), "--out", "x", "--dry-run"])
    assert done.exit_code == 0
    assert "note: chat template: it ends answers with <\\s>, which is no token; now </s>" in done.stderr
    assert plan(make_checkpoint(**tiled.LAYOUTS["Mistral"])).remarks == ()


def pins(*sizes: Any) -> dict[str, Any]:
    """A change of config.json."""
    return {"image_grid_pinpoints": list(sizes)}


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "none": (pins(), "image_grid_pinpoints holds 0 resolutions, expected 1 to 64"),
    "too many": (pins(*[[56, 112]] * 65), "image_grid_pinpoints holds 65 resolutions"),
    "one edge": (pins([56]), r"image_grid_pinpoints holds \[56\], expected two multiples of 56 pixels"),
    "no multiple": (pins([56, 113]), r"holds \[56, 113\], expected two multiples of 56"),
    "negative": (pins([-56, 56]), "expected two multiples of 56"),
    "fractions": (pins([56.0, 56.0]), "expected two multiples of 56"),
    "truth": (pins([True, 56]), "expected two multiples of 56"),
    "text": (pins("56x56"), "expected two multiples of 56"),
    "huge": (pins([56 * 10**9, 56]), r"holds \[56000000000, 56\], expected at most 36 tiles"),
    "no list": ({"image_grid_pinpoints": 56}, "image_grid_pinpoints holds 56 resolutions"),
    "another list": (pins([56, 112]), r"preprocessor: image_grid_pinpoints is .*, expected config.json's \[\[56, 112\]\]"),
}  # fmt: skip
BAD_ORIGINALS: dict[str, tuple[dict[str, Any], str]] = {
    "anyres_max_9": ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9', expected 'anyres', 'pad', 'square'"),
    "a range": ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, r"image_grid_pinpoints is '\(1x1\),...,\(6x6\)', expected a list"),
    "a program": ({"image_grid_pinpoints": "__import__('os').getcwd()"}, 'image_grid_pinpoints is "__import__'),
    "brackets": ({"image_grid_pinpoints": "[" * 9000}, "expected a list of"),
    "long": ({"image_grid_pinpoints": "[" + "(56, 56)," * 9000 + "]"}, "expected a list of"),
    "numbers as text": ({"image_grid_pinpoints": "[56, 56]"}, "holds 56, expected two multiples of 56"),
    "missing": ({"image_grid_pinpoints": None}, "image_grid_pinpoints is None, expected a list"),
    "merge": ({"mm_patch_merge_type": "spatial_pool"}, "mm_patch_merge_type is 'spatial_pool', expected 'spatial_unpad', 'spatial', 'flat'"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BAD_CONFIGS, *BAD_ORIGINALS])
def test_what_is_refused_by_name(make_checkpoint: Any, tmp_path: Path, case: str) -> None:
    layout = {**tiled.SMALL, "seed": 21, **({} if case in BAD_CONFIGS else ORIGINAL)}
    changes, message = BAD_CONFIGS.get(case) or BAD_ORIGINALS[case]
    with pytest.raises(UnsupportedCheckpoint, match=message) as caught:
        plan(changed(make_checkpoint(**layout), tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_processor_that_scales_tiles_again(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(make_checkpoint(**tiled.SMALL, seed=21), tmp_path / "checkpoint")
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    dump(folder / "preprocessor_config.json", processor | {"size": {"shortest_edge": 64}})
    with pytest.raises(UnsupportedCheckpoint, match="shortest_edge is 64, expected 56, a tile's"):
        plan(folder)


def test_the_newline_parameters_switch_is_ignored(make_checkpoint: Any, tmp_path: Path) -> None:
    """As transformers does, which has a newline in every model."""
    folder = changed(make_checkpoint(**tiled.SMALL, seed=21), tmp_path, use_image_newline_parameter=False)
    assert "v.image_newline" in {t.name for t in plan(folder).mmproj.tensors}


def test_a_newline_of_another_width(tmp_path: Path, make_bundle: Any) -> None:
    import small_checkpoint

    layout = small_checkpoint.Layout(**tiled.SMALL)
    folder = write(tmp_path / "checkpoint", layout)
    tensors = [
        (n, "F16", a.shape, a.astype(np.float16).tobytes()) for n, a in small_checkpoint.values(layout)
    ]
    cut = [(n, t, (s[0] - 1,), b[:-2]) if n == "image_newline" else (n, t, s, b) for n, t, s, b in tensors]
    small_checkpoint.write_tensors(folder, cut, layout)
    with pytest.raises(TensorMismatch, match=r"image_newline: shape \[255\], expected \[256\]"):
        plan(folder)
    mmproj = make_bundle("F16", "F16", **tiled.SMALL, seed=21).mmproj
    wide = rewritten(
        mmproj, tmp_path / "wide.gguf", rename={"v.image_newline": "v.x", "mm.0.bias": "v.image_newline"}
    )
    with pytest.raises(BundleError, match=r"'mm\.0\.bias' is missing|'v\.x' is unexpected"):
        check_mmproj(Header.read(wide))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([56, 112, 56], "has 3 items, expected pairs of 32-bit whole numbers"),
        ([56, 113], "expected two multiples of 56 pixels"),
        ([0, 56], "expected two multiples of 56 pixels"),
        ([56 * 1000, 56 * 1000], "expected at most 36 tiles"),
    ],
    ids=["odd", "no multiple", "zero", "huge"],
)
def test_pinpoints_that_a_file_cannot_have(
    make_bundle: Any, tmp_path: Path, sizes: list[int], message: str
) -> None:
    mmproj = make_bundle("F16", "F16", **tiled.SMALL, seed=21).mmproj
    bad = rewritten(mmproj, tmp_path / "bad.gguf", put={PINPOINTS: (sizes, V.ARRAY)})
    with pytest.raises(BundleError, match=message) as caught:
        check_mmproj(Header.read(bad))
    assert "\n" not in str(caught.value)


def test_a_published_file_is_read_and_repaired(make_bundle: Any, tmp_path: Path) -> None:
    """Its newline has the first script's name, its depth is missing, its pinpoints stay."""
    bundle = make_bundle("F16", "F16", **tiled.SMALL, seed=21)
    new, old = NEWLINES
    hub = hub_file(bundle.mmproj, tmp_path / "hub.gguf", rename={new: old})
    out = repair(examine(hub), tmp_path / "right.gguf")
    assert tensors_of(out) == tensors_of(bundle.mmproj)
    header = Header.read(out)
    assert check_mmproj(header) == check_mmproj(Header.read(bundle.mmproj))
    assert header.keys[PINPOINTS] == Header.read(bundle.mmproj).keys[PINPOINTS]
    bad = rewritten(hub, tmp_path / "bad.gguf", put={PINPOINTS: ([56, 57], V.ARRAY)})
    with pytest.raises(ConvertError, match="two multiples"):
        examine(bad)


def test_the_handler_with_files_that_stand_alone(make_bundle: Any, tmp_path: Path) -> None:
    """Tiles, merging and newline come from the mmproj's keys, under either name."""
    from llama_cpp import Llama

    bundle, data = make_bundle("F16", "F16", **tiled.LAYOUTS["Vicuna"]), pictures.twelve()["landscape"]
    with Llava.load(bundle.folder) as llava:
        expected, answer = llava.image_features(data), llava.ask(data, "What is it?", max_tokens=8)
    model = shutil.copy(bundle.model, tmp_path / "model.gguf")
    shutil.copy(bundle.mmproj, tmp_path / "new.gguf")
    rewritten(bundle.mmproj, tmp_path / "old.gguf", rename=dict([NEWLINES]))
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    image = {"type": "image_url", "image_url": {"url": uri}}
    request: Any = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
    for name in ("new.gguf", "old.gguf"):
        handler = LlavaChatHandler(tmp_path / name)
        llama: Any = Llama(str(model), chat_handler=handler, n_ctx=512, n_threads=1, verbose=False)
        assert np.array_equal(handler.session(llama).image_features(data), expected)
        found = llama.create_chat_completion(request, max_tokens=8, temperature=0.0)
        assert found["usage"]["prompt_tokens"] == answer.usage.prompt_tokens
        assert found["choices"][0]["message"]["content"].strip() == answer.text.strip()
        llama.close()

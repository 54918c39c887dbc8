"""The original authors' layout: the same model as under the hub's names, prompts and pictures as its code has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import recorded
import small_tokenizer
from click.testing import CliRunner
from PIL import Image
from small_checkpoint import CLIP, dump

from pocketllava import (
    Bundle,
    ConvertError,
    ImageError,
    Llava,
    Message,
    Options,
    TensorMismatch,
    UnsupportedCheckpoint,
)
from pocketllava.cli import cli
from pocketllava.convert import convert
from pocketllava.convert.pipeline import plan
from pocketllava.convert.read.original import canonical
from pocketllava.models.gguf_header import Header
from pocketllava.prompt.items import ImageSpan, placeholders
from pocketllava.vision import image

GREEDY = Options(max_tokens=recorded.N_TOKENS)
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
Turn = tuple[str, str, int]
CONVERSATIONS: dict[str, list[Turn]] = {
    "image": [("user", "What is shown in the image?", 1)],
    "no image": [("user", "What is it?", 0)],
    "two images": [("user", "Compare them.", 2)],
    "leading spaces": [("user", "  What is it?  ", 1)],
    "other scripts": [("user", "这张图片里有什么？ 🙂 é", 1)],
    "empty": [("user", "", 1)],
    "two turns": [("user", "What is it?", 1), ("assistant", "A red circle.", 0), ("user", "And there?", 0)],
    "images in two turns": [("user", "This?", 1), ("assistant", "A dog.", 0), ("user", "This?", 1)],
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "Llama, safetensors": {"naming": "original"},
    "Llama, .bin, a CLIP folder": {"naming": "original", "weights": "bin", "shards": 2, "tower": "folder", "seed": 1},
    "Mistral, .bin, BF16": {"naming": "original", "weights": "bin", "kind": "mistral", "kv_heads": 2, "dtype": "BF16", "seed": 2},
}  # fmt: skip


def prompt_of(turns: list[Turn], kind: str) -> str:
    """What Conversation.get_prompt gives with conv_llava_v1 and conv_mistral_instruct."""
    out = "" if kind == "mistral" else SYSTEM + " "
    for role, said, n in turns:
        said = "<image>\n" * n + said
        if kind == "mistral":
            out += f"[INST] {said} [/INST]" if role == "user" else f" {said} </s>"
        else:
            out += f"USER: {said} " if role == "user" else f"ASSISTANT: {said}</s>"
    return out if kind == "mistral" else out + "ASSISTANT:"


def as_messages(turns: list[Turn]) -> list[Message]:
    """As pocketllava takes them."""
    return [Message(role, said, (b"",) * n) for role, said, n in turns]  # type: ignore[arg-type]


def rendered(llava: Llava, turns: list[Turn]) -> str:
    """The prompt's text, special tokens spelled out."""
    with llava.session() as session:
        template = session.template
    names = {i: text for text, i in template.special.items() if text != "<image>"}
    pieces = template.pieces(as_messages(turns), placeholders([576] * sum(n for *_, n in turns)))
    return "".join(
        "<image>" if isinstance(p, ImageSpan) else names[p] if isinstance(p, int) else p for p in pieces
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_prompts_and_answers(make_bundle: Any, name: str) -> None:
    layout = LAYOUTS[name]
    kind = layout.get("kind", "llama")
    with Llava.load(make_bundle("F16", "F16", **layout).folder) as llava:
        for turns in CONVERSATIONS.values():
            assert rendered(llava, turns) == "<s>" + prompt_of(turns, kind)
        expected = recorded.load(recorded.ORIGINAL_FILE)
        answers = [list(llava.ask(p, recorded.QUESTION, options=GREEDY).token_ids) for p in pictures.four()]
        for ids, wanted, ties in zip(
            answers, expected[f"answers, {name}"], expected[f"ties, {name}"], strict=True
        ):
            recorded.assert_equal_or_tie(ids, wanted, ties)
        for case, turns in CONVERSATIONS.items():
            with llava.session() as session:
                found = session.count(as_messages(turns))
            ids = [i if isinstance(i, int) else -200 for i in found]
            assert ids == expected[f"token ids, {kind}"][case], case


def test_what_a_user_writes_stays_text(make_bundle: Any) -> None:
    with Llava.load(make_bundle("F16", "F16", naming="original").folder) as llava:
        with llava.session() as session:
            template = session.template
        pieces = template.pieces([Message("user", "an <image> and </s>")], [])
        assert [p for p in pieces if not isinstance(p, str)] == [1]
        assert template.eos == "</s>"


def test_a_system_message_replaces_the_system_line(make_bundle: Any) -> None:
    turns = [("system", "Be brief.", 0), ("user", "Hi", 0)]
    with Llava.load(make_bundle("F16", "F16", naming="original").folder) as llava:
        assert rendered(llava, turns) == "<s>Be brief. USER: Hi ASSISTANT:"
    mistral = LAYOUTS["Mistral, .bin, BF16"]
    with Llava.load(make_bundle("F16", "F16", **mistral).folder) as llava:
        assert rendered(llava, turns) == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"


@pytest.mark.parametrize("quant", ["F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_tensors_are_those_of_the_hub_layout(make_bundle: Any, quant: str) -> None:
    """Byte for byte; the hub's vocabulary has rows more, at its end."""
    original, hub = (
        make_bundle(quant, "F16", naming="original", weights="bin", tower="folder"),
        make_bundle(quant, "F16"),
    )
    for name in ("model.gguf", "mmproj.gguf"):
        converted, expected = tensors_of(original.folder / name), tensors_of(hub.folder / name)
        assert list(converted) == list(expected)
        for tensor, data in converted.items():
            assert expected[tensor][: len(data)] == data, tensor
            assert len(expected[tensor]) == len(data) or tensor in ("token_embd.weight", "output.weight")


def tensors_of(path: Path) -> dict[str, bytes]:
    """Tensor bytes by name."""
    header, data = Header.read(path), path.read_bytes()
    start = header.data_start
    return {n: data[start + t.offset : start + t.offset + t.n_bytes] for n, t in header.tensors.items()}


def test_the_manifest(make_bundle: Any) -> None:
    bundle: Bundle = make_bundle("F16", "F16", naming="original")
    assert bundle.preprocessing.pad_to_square
    assert bundle.space_prefix == "chunk"
    assert bundle.manifest.image_token == "<image>"
    assert len(Header.read(bundle.model).keys["tokenizer.ggml.tokens"]) == len(small_tokenizer.vocabulary())


def test_the_manifest_names_the_towers_file_too(make_bundle: Any) -> None:
    bundle = make_bundle("F16", "F16", **LAYOUTS["Llama, .bin, a CLIP folder"])
    shards = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    assert sorted(bundle.manifest.source.weights) == [f"{CLIP}/pytorch_model.bin", *shards]


def test_square_images_are_not_padded(make_checkpoint: Any) -> None:
    assert not plan(make_checkpoint(naming="original", aspect="square")).opened.preprocessing.pad_to_square


def test_llava_1_5s_own_tower_needs_no_network(make_checkpoint: Any, tmp_path: Path) -> None:
    """Inside the checkpoint and of the known name, whatever folder it had: the config is known."""
    folder = changed(
        make_checkpoint(naming="original"), tmp_path, mm_vision_tower="/data/clip-vit-large-patch14-336"
    )
    with pytest.raises(TensorMismatch, match=r"class_embedding: shape \[64\], expected \[1024\]"):
        plan(folder)


def test_the_tower_that_is_given(make_checkpoint: Any, tmp_path: Path) -> None:
    whole = make_checkpoint(naming="original", weights="bin", tower="folder")
    folder = changed(whole, tmp_path, mm_vision_tower="/nowhere/clip")
    with pytest.raises(ConvertError, match=r"'/nowhere/clip', expected .*: give --vision-tower FOLDER"):
        plan(folder)
    planned = plan(folder, vision_tower=whole / CLIP)
    assert planned.dropped["text_model.final_layer_norm.weight"] == "not the vision tower's"
    out = CliRunner().invoke(
        cli, ["convert", str(folder), "--out", "x", "--vision-tower", str(whole / CLIP), "--dry-run"]
    )
    assert out.exit_code == 0, out.output


OPENED_UNASKED = (
    "somebody/clip",
    "../{clip}",
    "{folder}/{clip}",
    "{folder}/sub/../{clip}",
    "C:\\clip",
    "~/clip",
)


@pytest.mark.parametrize("name", OPENED_UNASKED)
@pytest.mark.parametrize("tower", ["inside", "folder"])
def test_a_tower_elsewhere_is_not_opened_unasked(
    make_checkpoint: Any, tmp_path: Path, name: str, tower: str
) -> None:
    """Neither a path beside the checkpoint that exists nor a stranger's hub id; a link out of it is no way either."""
    whole = make_checkpoint(naming="original", weights="bin", tower=tower)
    named = name.format(folder=whole, clip=CLIP)
    with pytest.raises(ConvertError, match=r"mm_vision_tower is .* nothing else is opened unasked"):
        plan(changed(whole, tmp_path, mm_vision_tower=named))


def test_a_link_out_of_the_checkpoint_is_not_followed(make_checkpoint: Any, tmp_path: Path) -> None:
    whole = make_checkpoint(naming="original", weights="bin", tower="folder")
    folder = changed(whole, tmp_path, mm_vision_tower="link")
    try:
        (folder / "link").symlink_to(whole / CLIP, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    with pytest.raises(ConvertError, match="nothing else is opened unasked"):
        plan(folder)


@pytest.mark.parametrize("known", ["clip-vit-large-patch14", "clip-vit-large-patch14-336"])
def test_openais_towers_are_read_from_the_hub_after_saying_so(
    make_checkpoint: Any,
    tmp_path: Path,
    known: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the hub, not from a folder of that name where the command happens to run."""
    whole = make_checkpoint(naming="original", weights="bin", tower="folder")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole / CLIP, tmp_path / "openai" / known)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ConvertError, match=f"vision tower openai/{known}: .*the hub gave nothing"):
        plan(changed(whole, tmp_path, mm_vision_tower=f"/data/{known}"))
    assert f"config.json names the vision tower openai/{known}: reading it from the hub" in caplog.text


def test_a_given_tower_replaces_the_one_inside(make_checkpoint: Any) -> None:
    other = make_checkpoint(naming="original", weights="bin", tower="folder", seed=1) / CLIP
    planned = plan(make_checkpoint(naming="original"), vision_tower=other)
    sources = {t.source.file.parent for t in planned.mmproj.tensors if t.name.startswith("v.")}
    assert sources == {other}
    assert "replaced by --vision-tower" in planned.dropped.values()


def changed(source: Path, tmp_path: Path, **changes: Any) -> Path:
    """A copy with another config.json; None leaves a key out."""
    folder = shutil.copytree(source, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text()) | changes
    dump(folder / "config.json", {k: v for k, v in config.items() if v is not None})
    return folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "linear projector": ({"mm_projector_type": None}, "mm_projector_type is 'linear', expected 'mlp2x_gelu'; LLaVA-1.0"),
    "deeper projector": ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
    "start and end": ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
    "class token": ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
    "anyres": ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints is None, expected a list"),
    "s2": ({"s2": True}, "s2 is True"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, r"already quantized \(awq\)"),
    "no tower": ({"mm_vision_tower": None}, "mm_vision_tower is None, expected a name"),
    "MPT": ({"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt"}, "LlavaMptForCausalLM|unexpected tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_name(make_checkpoint: Any, tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ConvertError, match=message) as caught:
        plan(changed(make_checkpoint(naming="original"), tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_a_tower_that_is_not_clip(make_checkpoint: Any, tmp_path: Path) -> None:
    tower = tmp_path / "siglip"
    tower.mkdir()
    dump(
        tower / "config.json",
        {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}},
    )
    with pytest.raises(UnsupportedCheckpoint, match="vision tower 'siglip', expected 'clip'"):
        plan(make_checkpoint(naming="original"), vision_tower=tower)


def test_a_hub_checkpoint_takes_no_tower(make_checkpoint: Any, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="leave --vision-tower out"):
        convert(make_checkpoint(), tmp_path / "b", vision_tower=tmp_path)


def test_canonical_names() -> None:
    assert canonical("model.mm_projector.2.bias") == "projector.linear_2.bias"
    assert (
        canonical("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias")
        == "vision.pre_layrnorm.bias"
    )
    assert canonical("model.layers.0.mlp.up_proj.weight") == "text.layers.0.mlp.up_proj.weight"
    assert canonical("model.image_newline") == "projector.image_newline"
    assert canonical("model.image_start") is canonical("model.mm_projector.weight") is None


def expand_by_hand(picture: Image.Image) -> Image.Image:
    """expand2square with LLaVA's background, pixel by pixel in an array."""
    side = max(picture.size)
    square = np.tile(np.array((122, 116, 104), np.uint8), (side, side, 1))
    top, left = (side - picture.height) // 2, (side - picture.width) // 2
    square[top : top + picture.height, left : left + picture.width] = np.asarray(picture)
    return Image.fromarray(square)


def test_padding_equals_padding_by_hand(make_bundle: Any) -> None:
    how = make_bundle("F16", "F16", naming="original").preprocessing
    plain = make_bundle("F16", "F16").preprocessing
    for data in pictures.twelve().values():
        assert np.array_equal(
            image.preprocess(data, how), image.preprocess(expand_by_hand(image.load(data)), plain)
        )


def test_a_padded_square_has_a_limit(make_bundle: Any) -> None:
    how = make_bundle("F16", "F16", naming="original").preprocessing
    with pytest.raises(ImageError, match="padded to a square of 20000 x 20000"):
        image.preprocess(np.zeros((100, 20000, 3), np.uint8), how)

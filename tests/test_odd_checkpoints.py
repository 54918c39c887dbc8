"""Odd checkpoints convert as transformers loads them, and a remark says what is odd."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import odd_checkpoints
import pytest
import recorded
from click.testing import CliRunner
from odd_checkpoints import EMBEDDING, HEAD, TENSORS, TOKENS, Change, both, chat, edited
from prompts import PROMPTS, messages

from pocketllava import Bundle, ConvertError, Llava
from pocketllava.cli import cli
from pocketllava.convert import convert
from pocketllava.convert.pipeline import ConvertPlan, plan

REMARKS = {
    "a whole file beside older shards": "model.safetensors: read; model.safetensors.index.json beside it is ignored",
    "a whole file beside lost shards": "model.safetensors: read; model.safetensors.index.json beside it is ignored",
    "tensors in two shards": "in several shards, read from the last: ",
    "rotary frequencies in the index": f"named there, in no shard: {odd_checkpoints.INV_FREQ}",
    "tensors outside the index": "not named there: optimizer.step and 1 more",
    "tied above, another head": f"tie_word_embeddings: true, but {HEAD} differs from {EMBEDDING}; both are used",
    "tied below, another head": f"tie_word_embeddings: true, but {HEAD} differs from {EMBEDDING}; both are used",
    "tied, the head alone": f"tie_word_embeddings: {HEAD} is the token embedding too",
    "chat_template.json beside .jinja": "chat template: chat_template.json's; ignored: chat_template.jinja",
    "processor_config.json's template": "chat template: processor_config.json's; ignored: chat_template.json",
    "tokenizer.model alone, no add_bos_token": "tokenizer_config.json: no add_bos_token",
    "an added token beyond the embedding": "are left out: '<extra>' (704)",
}


def prompt_ids(bundle: Bundle) -> dict[str, str]:
    """Token ids of the prompts, the image token's where a picture stands."""
    with Llava.load(bundle.folder) as llava, llava.session() as session:
        prompts = {name: session.count(messages(PROMPTS[name])) for name in odd_checkpoints.PROMPTS}
    image_id = bundle.manifest.image_token_id
    return {
        name: " ".join(str(i if isinstance(i, int) else image_id) for i in items)
        for name, items in prompts.items()
    }


@pytest.mark.parametrize("name", TOKENS)
def test_prompts_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    folder = odd_checkpoints.write(tmp_path / "checkpoint", name)
    assert prompt_ids(convert(folder, tmp_path / "bundle", quant="F16")) == odd_checkpoints.load()[name]


def sources(planned: ConvertPlan) -> dict[str, bytes]:
    """The bytes that each tensor of the text model will be made from."""
    out = {}
    for tensor in planned.text.tensors:
        data = tensor.source.file.read_bytes()
        out[tensor.name] = data[tensor.source.offset : tensor.source.offset + tensor.source.n_bytes]
    return out


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_those_that_transformers_loads(tmp_path: Path, name: str) -> None:
    plain = odd_checkpoints.small_checkpoint.write(tmp_path / "plain", **odd_checkpoints.LAYOUT)
    expected = sources(plan(plain))
    if name == "tied, the head alone":
        expected["token_embd.weight"] = expected.pop("output.weight")
    assert sources(plan(odd_checkpoints.write(tmp_path / "odd", name))) == expected


@pytest.mark.parametrize("name", REMARKS)
def test_a_remark_says_what_is_odd(tmp_path: Path, name: str) -> None:
    folder = odd_checkpoints.write(tmp_path / "checkpoint", name)
    (remark,) = plan(folder).remarks
    assert REMARKS[name] in remark
    result = CliRunner().invoke(cli, ["convert", str(folder), "-o", str(tmp_path / "bundle"), "--dry-run"])
    assert (result.exit_code, result.stderr) == (0, f"note: {remark}\n")


def test_a_sound_checkpoint_gets_no_remark(make_checkpoint: Any) -> None:
    assert plan(make_checkpoint()).remarks == ()


def test_equal_head_and_embedding_stay_one(tmp_path: Path) -> None:
    folder = odd_checkpoints.small_checkpoint.write(tmp_path / "checkpoint", **odd_checkpoints.LAYOUT)
    tensors = {t[0]: t for t in odd_checkpoints.tensors()}
    tensors[HEAD] = (HEAD, *tensors[EMBEDDING][1:])
    odd_checkpoints.write_safetensors(folder / "model.safetensors", list(tensors.values()))
    odd_checkpoints.tie(folder, top=True)
    planned = plan(folder)
    assert planned.remarks == ()
    assert planned.dropped[HEAD] == "tied to the token embedding"


def test_a_gelu_tower_is_remarked_upon(tmp_path: Path) -> None:
    folder = odd_checkpoints.small_checkpoint.write(tmp_path / "checkpoint", **odd_checkpoints.LAYOUT)
    edited("config.json", lambda data: data["vision_config"].update(hidden_act="gelu"))(folder)
    (remark,) = plan(folder).remarks
    assert remark.startswith("hidden_act gelu: llama.cpp computes the vision tower's by the tanh formula")


FOREIGN: dict[str, bytes] = {
    "results.json": b"[1, 2]",
    "vocab.json": b"{broken",
    "trainer_state.json": b'{"log_history": [' + b"0," * (1 << 20) + b"0]}",
    "latin-1.json": b"\xff\xfe",
    "special.jinja": b"{% for %}",
}


def test_other_programs_files_are_not_read(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint(), folder)
    for name, data in FOREIGN.items():
        (folder / name).write_bytes(data)
    assert plan(folder).remarks == ()


IMAGE = {"type": "image"}
TEMPLATES: dict[str, tuple[Change, str]] = {
    "shows no image": (chat("{# image #}USER: hello"), "it shows 0 images of a conversation with 1"),
    "shows one twice": (chat("{% for m in messages %}<image><image>{% endfor %}"), "shows 2 images"),
    "does not parse": (chat("{% for image %}"), "cannot be rendered"),
    "loops": (
        chat("{# image #}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        "it makes more text|it takes longer",
    ),
    "writes 50 MB": (
        chat("{# image #}{% for a in range(500) %}" + "x" * 50_000 + "{% endfor %}"),
        "it makes more",
    ),
    "is huge": (chat("{# image" + "x" * (1 << 16) + " #}"), "expected at most 65536"),
    "another image token": (
        edited("config.json", lambda data: data.update(image_token_index=recorded.image_token() + 1)),
        "it shows 0 images of a conversation with 1, expected each as one <pad>",
    ),
    "no image token": (
        both(
            edited("config.json", lambda data: data.update(image_token_index=703)),
            chat(odd_checkpoints.SHORT),
        ),
        "image_token_index 703, which the tokenizer's files do not name",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_that_cannot_be_used_are_refused_before_the_work(tmp_path: Path, name: str) -> None:
    change, message = TEMPLATES[name]
    folder = odd_checkpoints.small_checkpoint.write(tmp_path / "checkpoint", **odd_checkpoints.LAYOUT)
    change(folder)
    with pytest.raises(ConvertError, match=message) as caught:
        convert(folder, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]

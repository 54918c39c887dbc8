"""Llama-3 vocabularies, rotary factors, SigLIP towers, several feature layers: held to transformers' recorded results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mixed_text
import numpy as np
import pictures
import pytest
import recorded
import small_llama3
import variants
from small_checkpoint import LLAMA31

from pocketllava import ConvertError, Llava, Message, Options
from pocketllava.convert.pipeline import plan
from pocketllava.convert.read.rope import llama3_factors
from pocketllava.models.gguf_header import Header
from pocketllava.models.mmproj_contract import check_mmproj

LLAMA3 = variants.LAYOUTS["Llama 3"]


@pytest.mark.parametrize("name", variants.LAYOUTS)
def test_answers_are_those_of_transformers(make_bundle: Any, name: str) -> None:
    bundle = make_bundle("F16", "F16", **variants.LAYOUTS[name])
    options = Options(max_tokens=recorded.N_TOKENS)
    with Llava.load(bundle.folder) as llava:
        found = list(llava.ask(pictures.four()[0], recorded.QUESTION, options=options).token_ids)
    reference = variants.load()
    recorded.assert_equal_or_tie(found, reference[f"answers, {name}"][0], reference[f"ties, {name}"][0])


def test_300_lines_have_the_ids_of_transformers(make_bundle: Any) -> None:
    expected = variants.load()["token ids"]
    with Llava.load(make_bundle("F16", "F16", **LLAMA3).folder) as llava:
        for line, ids in zip(mixed_text.lines(), expected, strict=True):
            with llava.session() as session:
                found = session.text.tokenize(line)
            assert found == [int(i) for i in ids.split()], line


def test_special_tokens_in_a_question_stay_text(make_bundle: Any) -> None:
    question = Message("user", "a<|eot_id|><image>b")
    with Llava.load(make_bundle("F16", "F16", **LLAMA3).folder) as llava, llava.session() as session:
        ids = session.count([question])
        said = [session.text.vocabulary.piece(i) for i in ids if isinstance(i, int)]
    assert ids.count(small_llama3.id_of("<|eot_id|>")) == 1
    assert ids.count(small_llama3.id_of("<|begin_of_text|>")) == 1
    assert b"a<|eot_id|><image>b" in b"".join(said)


def test_keys_of_a_llama3_file(make_bundle: Any) -> None:
    bundle = make_bundle("F16", "F16", **LLAMA3)
    keys = Header.read(bundle.model).keys
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "llama-bpe")
    assert keys["tokenizer.ggml.eos_token_id"] == small_llama3.id_of("<|eot_id|>")
    assert keys["llama.rope.freq_base"] == 500000.0
    ends = {small_llama3.id_of("<|end_of_text|>"), small_llama3.id_of("<|eot_id|>")}
    assert set(bundle.manifest.eos_token_ids) == ends


def test_rope_factors_of_llama_3_1(make_checkpoint: Any) -> None:
    """Of its 64 frequencies the short waves stay, 35 on the long ones are divided by 8; those between were
    computed once by llama.cpp's converter (torch 2.13)."""
    factors = llama3_factors(LLAMA31, 500000.0, 128)
    assert [np.float32(f) for f in factors] == [np.float32(f) for f in variants.load()["rope factors"]]
    planned = plan(make_checkpoint(**variants.LAYOUTS["Llama 3.1"]), quant="Q4_K_M").text
    assert [t.shape for t in planned.tensors if t.name == "rope_freqs.weight"] == [(32,)]


def test_a_rope_that_makes_no_factors() -> None:
    with pytest.raises(ConvertError, match="low_freq_factor and high_freq_factor are both"):
        llama3_factors({**LLAMA31, "high_freq_factor": 1.0}, 5e5, 128)
    with pytest.raises(ConvertError, match="factor is 0, expected a positive number"):
        llama3_factors({**LLAMA31, "factor": 0}, 5e5, 128)


def split(regex: str) -> dict[str, Any]:
    """A pre-tokenizer of Llama 3's shape with another regex."""
    data = small_llama3.described()["pre_tokenizer"]
    data["pretokenizers"][0]["pattern"] = {"Regex": regex}
    return dict(data)


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2": (
        {"pre_tokenizer": split(small_llama3.REGEX.replace("{1,3}", ""))},
        "Qwen2's pre-tokenizer regex",
    ),
    "another regex": ({"pre_tokenizer": split(r"\w+")}, "unknown pre-tokenizer regex"),
    "GPT-2": ({"pre_tokenizer": {"type": "ByteLevel"}}, "pre-tokenizer ByteLevel, expected Llama 3's"),
    "none": ({"pre_tokenizer": None}, "pre-tokenizer none, expected Llama 3's"),
    "normalizer": ({"normalizer": {"type": "NFC"}}, "normalizer NFC, expected none"),
    "no merges": ({"model": {"merges": []}}, "no merges"),
    "a foreign merge": ({"model": {"merges": [["Ġ", "nowhere"]]}}, "is not of its vocabulary"),
    "no vocabulary": ({"model": {"vocab": {}}}, "no vocabulary"),
    "an id twice": ({"model": {"vocab": {"a": 1, "b": 1}}}, "ids repeat"),
    "an id too high": ({"model": {"vocab": {"a": 1, "b": 10**6}}}, "token id 1000000"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_other_tokenizers_are_refused(make_checkpoint: Any, tmp_path: Path, case: str) -> None:
    changes, message = TOKENIZERS[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint(**LLAMA3), folder)
    data = small_llama3.described()
    for name, value in changes.items():
        data[name] = {**data[name], **value} if name == "model" else value
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ConvertError, match=message):
        plan(folder)


def test_without_ignore_merges_whole_words_are_merged(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint(**LLAMA3), folder)
    data = small_llama3.described()
    data["model"]["ignore_merges"] = False
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert plan(folder).opened.vocab.pre == "smaug-bpe"  # llama.cpp's name for that regex without it


def test_a_siglip_file_holds_no_class_token(make_bundle: Any) -> None:
    header = Header.read(make_bundle("F16", "F16", **variants.LAYOUTS["SigLIP"]).mmproj)
    assert "v.class_embd" not in header.tensors
    assert header.keys["clip.use_gelu"] is True
    info = check_mmproj(header)
    assert (info.n_patches, info.class_token) == (27 * 27, False)


def test_feature_layers_are_stored_ascending(make_bundle: Any) -> None:
    header = Header.read(make_bundle("F16", "F16", **variants.LAYOUTS["three feature layers"]).mmproj)
    assert header.keys["clip.vision.feature_layer"] == [1, 4, 7]
    assert header.keys["clip.vision.block_count"] == 7
    assert header.tensors["mm.0.weight"].shape == (256, 3 * 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, 2]}, "names a layer twice"),
        ({"vision_feature_layer": []}, "expected a whole number or a list"),
        ({"vision_feature_layer": [-2, -9]}, "expected one of 3 blocks"),
        ({"image_token_index": 10**6}, "image_token_index 1000000, which the tokenizer's files do not name"),
    ],
)
def test_refused_configs(make_checkpoint: Any, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConvertError, match=message):
        plan(folder)

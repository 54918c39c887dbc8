"""Checkpoints that cannot be converted: one line that names the thing, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_checkpoint import dump, to_bytes, write_safetensors

from pocketllava import ConvertError, TensorMismatch, UnsupportedCheckpoint
from pocketllava.convert import convert
from pocketllava.convert.pipeline import plan
from pocketllava.convert.read.safetensors import read_safetensors

Spoil = Callable[[Path], None]
Tensor = tuple[str, str, tuple[int, ...], bytes]
Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"


def config(**changes: Any) -> Spoil:
    """Change config.json; a key like "text_config.model_type" goes below."""

    def spoil(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            part, _, key = name.rpartition("__")
            (data[part] if part else data)[key] = value
        dump(folder / "config.json", data)

    return spoil


def weights(change: Callable[[list[Tensor]], list[Tensor]]) -> Spoil:
    """Change the list of tensors."""

    def spoil(folder: Path) -> None:
        layout = small_checkpoint.Layout()
        tensors = [(n, "F16", a.shape, to_bytes(a, "F16")) for n, a in small_checkpoint.values(layout)]
        write_safetensors(folder / "model.safetensors", change(tensors))

    return spoil


def without(name: str) -> Spoil:
    """A tensor less."""
    return weights(lambda tensors: [t for t in tensors if t[0] != name])


def instead(name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> Spoil:
    """Another tensor under the same name."""
    return weights(lambda tensors: [(name, dtype, shape, data) if t[0] == name else t for t in tensors])


def header(change: Callable[[dict[str, Any]], None]) -> Spoil:
    """Change the safetensors header, leaving the data where it is."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def cut(folder: Path) -> None:
    """Lose the last kilobyte."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pointer(name: str) -> Spoil:
    """A git-lfs pointer where a file should be."""
    return lambda folder: (
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n") and None
    )


def moved_past_the_end(entries: dict[str, Any]) -> None:
    """Offsets of one tensor beyond the file."""
    first, last = entries[Q_PROJ]["data_offsets"]
    entries[Q_PROJ]["data_offsets"] = [first + 10**9, last + 10**9]


def overlapping(entries: dict[str, Any]) -> None:
    """Two tensors in one place."""
    other = Q_PROJ.replace("q_proj", "o_proj")
    entries[other]["data_offsets"] = entries[Q_PROJ]["data_offsets"]


def lost_shard(folder: Path) -> None:
    """An index that names a file which is not there, and no whole file."""
    (folder / "model.safetensors").unlink()
    dump(
        folder / "model.safetensors.index.json", {"weight_map": {Q_PROJ: "model-00002-of-00003.safetensors"}}
    )


def pickled(folder: Path) -> None:
    """A .bin file that is no torch file."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_weights(folder: Path) -> None:
    """Weights under another name."""
    (folder / "model.safetensors").rename(folder / "weights.pth")


nan = np.full((256, 256), np.nan, np.float16).tobytes()
quantized = {"quant_method": "gptq"}
CASES: dict[str, tuple[Spoil, type[ConvertError], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ConvertError, "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{") and None, ConvertError, "config.json: not readable as JSON"),
    "Pixtral": (config(vision_config={"model_type": "pixtral"}), UnsupportedCheckpoint, "vision tower 'pixtral', expected 'clip_vision_model'"),
    "VipLlava": (config(model_type="vipllava", architectures=["VipLlavaForConditionalGeneration"]), UnsupportedCheckpoint, "found VipLlavaForConditionalGeneration"),
    "LLaVA-1.6 without a newline": (config(model_type="llava_next", architectures=["LlavaNextForConditionalGeneration"]), TensorMismatch, "image_newline"),
    "LLaVA-OneVision": (config(model_type="llava_onevision", architectures=["LlavaOnevisionForConditionalGeneration"]), UnsupportedCheckpoint, "found LlavaOnevisionForConditionalGeneration"),
    "a text model": (config(model_type="llama", architectures=["LlamaForCausalLM"]), UnsupportedCheckpoint, "found LlamaForCausalLM"),
    "Qwen text": (config(text_config={"model_type": "qwen2"}), UnsupportedCheckpoint, "text model 'qwen2', expected one of llama, mistral"),
    "full strategy": (config(vision_feature_select_strategy="full"), UnsupportedCheckpoint, "vision_feature_select_strategy 'full'"),
    "feature layers": (config(vision_feature_layer=[-2, -2]), UnsupportedCheckpoint, r"vision_feature_layer \[-2, -2\] names"),
    "feature layer too deep": (config(vision_feature_layer=9), UnsupportedCheckpoint, "vision_feature_layer is 9"),
    "quantized": (config(quantization_config=quantized), UnsupportedCheckpoint, r"already quantized \(gptq\)"),
    "yarn": (config(text_config__rope_scaling={"rope_type": "yarn", "factor": 2}), UnsupportedCheckpoint, "rope_type 'yarn'"),
    "projector act": (config(projector_hidden_act="relu"), UnsupportedCheckpoint, "projector_hidden_act 'relu'"),
    "odd heads": (config(text_config__num_key_value_heads=3), UnsupportedCheckpoint, "num_key_value_heads is 3, expected a divisor of 4 heads"),
    "no number": (config(text_config__hidden_size="256"), ConvertError, "hidden_size is '256', expected a positive whole number"),
    "wrong width": (config(text_config__hidden_size=512), TensorMismatch, r"embed_tokens.weight: shape \[704, 256\], expected \[704, 512\]"),
    "too few layers": (config(text_config__num_hidden_layers=3), TensorMismatch, r"layers.3.* unexpected tensor in the text part \(9 such tensors\)"),
    "too many layers": (config(text_config__num_hidden_layers=5), TensorMismatch, r"text.layers.4.input_layernorm.weight: missing"),
    "LoRA": (lambda f: dump(f / "adapter_config.json", {}), UnsupportedCheckpoint, "a LoRA adapter; merge it"),
    "no pickle": (pickled, ConvertError, "pytorch_model.bin: no zip archive"),
    "other weights": (other_weights, ConvertError, r"no model.safetensors, no pytorch_model.bin .* \(found weights.pth\)"),
    "missing shard": (lost_shard, ConvertError, "shard 'model-00002-of-00003.safetensors' is missing"),
    "truncated": (cut, ConvertError, "the file is truncated: download it again"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b"") and None, ConvertError, "0 bytes, not a whole safetensors file"),
    "offsets past the end": (header(moved_past_the_end), ConvertError, f"tensor '{Q_PROJ}' ends at .*; the file is truncated"),
    "overlap": (header(overlapping), ConvertError, "overlaps the one before it"),
    "wrong shape": (instead(Q_PROJ, "F16", (128, 256), bytes(128 * 256 * 2)), TensorMismatch, r"q_proj.weight: shape \[128, 256\], expected \[256, 256\]"),
    "missing tensor": (without("multi_modal_projector.linear_2.bias"), TensorMismatch, "projector.linear_2.bias: missing"),
    "missing class token": (without("vision_tower.vision_model.embeddings.class_embedding"), TensorMismatch, "vision.embeddings.class_embedding: missing"),
    "unexpected tensor": (weights(lambda t: [*t, ("language_model.model.extra", "F16", (2,), bytes(4))]), TensorMismatch, "language_model.model.extra: unexpected tensor in the text part"),
    "a part we don't know": (weights(lambda t: [*t, ("audio_tower.w", "F16", (2,), bytes(4))]), TensorMismatch, "1 unexpected tensors, first 'audio_tower.w'"),
    "a tensor twice": (weights(lambda t: [*t, ("model." + Q_PROJ, "F16", (256, 256), bytes(1 << 17))]), TensorMismatch, "a second time"),
    "integers": (instead(Q_PROJ, "I8", (256, 256), bytes(1 << 16)), UnsupportedCheckpoint, "stored as I8, expected F32, F16 or BF16"),
    "NaN": (instead(Q_PROJ, "F16", (256, 256), nan), ConvertError, f"tensor {Q_PROJ}: holds NaN or infinite values"),
    "lfs weights": (pointer("model.safetensors"), ConvertError, "a git-lfs pointer, not the file"),
    "lfs tokenizer": (pointer("tokenizer.model"), ConvertError, "tokenizer.model: a git-lfs pointer"),
    "lfs config": (pointer("config.json"), ConvertError, "config.json: a git-lfs pointer"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer.*")] and None, ConvertError, "no tokenizer.model and no tokenizer.json"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"\x0a\xff\xff") and None, ConvertError, "not a SentencePiece model"),
    "another crop": (lambda f: dump(f / "preprocessor_config.json", {"crop_size": 224}), UnsupportedCheckpoint, r"crop_size is \(224, 224\)"),
    "another processor": (lambda f: dump(f / "preprocessor_config.json", {"image_processor_type": "PixtralImageProcessor"}), UnsupportedCheckpoint, "'PixtralImageProcessor'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_converted_is_one_line(make_checkpoint: Any, tmp_path: Path, case: str) -> None:
    spoil, kind, message = CASES[case]
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint(), folder)
    spoil(folder)
    with pytest.raises(kind, match=message) as caught:
        convert(folder, tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(
    ("source", "message"), [("no/such/folder/here", "found nothing"), (__file__, "found a file")]
)
def test_sources_that_are_no_checkpoint(source: str, message: str) -> None:
    with pytest.raises(ConvertError, match=f"{message}, expected a checkpoint's folder or a hub id"):
        plan(source)


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConvertError, match=r"nobody/nothing: no such folder, and the hub gave nothing"):
        plan("nobody/nothing")


def test_weights_too_large_for_f16(make_checkpoint: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint(dtype="BF16"), folder)
    tensors = []
    for name, array in small_checkpoint.values(small_checkpoint.Layout(dtype="BF16")):
        if name.endswith("embed_tokens.weight"):
            array[-1] = 1e8  # a row that no token uses
        tensors.append((name, "BF16", array.shape, to_bytes(array, "BF16")))
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(ConvertError, match="F16 ends at 65504; use BF16 or F32"):
        convert(folder, tmp_path / "f16", quant="F16")
    assert convert(folder, tmp_path / "bf16", quant="BF16").manifest.types.model == "BF16"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
)
ENTRIES = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F16", "F32", "BF16", "X"]) | VALUES,
    "shape": st.lists(st.integers(-1, 9), max_size=3) | VALUES,
    "data_offsets": st.lists(st.integers(-4, 400), min_size=2, max_size=2) | VALUES,
})  # fmt: skip
HEADERS = st.dictionaries(st.text(max_size=6), ENTRIES | VALUES, max_size=4) | VALUES


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_safetensors_headers(tmp_path: Path, data: st.DataObject) -> None:
    """Any header either lists tensors that lie inside the file, or is a ConvertError of one line."""
    text = json.dumps(data.draw(HEADERS)).encode()
    length = data.draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(200))
    try:
        for tensor in read_safetensors(path):
            assert tensor.offset + tensor.n_bytes <= path.stat().st_size
    except ConvertError as error:
        assert "\n" not in str(error)

"""Published files by their header listings: which LLaVA each is, what is mended, or what it is instead."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader, quants
from published_files import build, listed, said_counts, whole_listings
from test_repair import rewritten

from pocketllava import BundleError, Llava
from pocketllava.convert.foreign import pair, said, text_model
from pocketllava.convert.pair import style
from pocketllava.measure.feature_drift import features_move
from pocketllava.models.gguf_header import Header
from pocketllava.names import demo_bundle, open_bundle

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sparse files")
DEPTH, WIDTH = "clip.vision.feature_layer is missing", "clip.vision.projection_dim is 768: now"
SWAP, TYPE, NEWLINE = (
    "ffn_up and ffn_down",
    "clip.projector_type is missing",
    "the tensor v.image_newline has",
)
FIRST = (SWAP, WIDTH, DEPTH)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("pocketllava.convert.foreign.cache_folder", lambda: tmp_path / "cache")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "mmproj", "width", "tiled", "prompt", "mended"),
    [
        ("llava-v1.5-7b-Q4_K", "mmproj-llava-v1.5-7b-f16", 4096, False, "vicuna_v1", (*FIRST, TYPE)),
        ("llava-v1.5-7b-Q4_K", "mmproj-llava-v1.5-7b-Q4_0", 4096, False, "vicuna_v1", (*FIRST, TYPE)),
        ("bakllava-1-Q4_K", "mmproj-llava-v1.5-7b-f16", 4096, False, "vicuna_v1", (*FIRST, TYPE)),
        ("llava-v1.6-mistral-7b.Q4_K_M", "mmproj-ollama-llava-7b-v1.6", 4096, False, "mistral", FIRST),
        ("llama-3-8b-f16", "mmproj-llava-llama-3-8b-f16", 4096, False, "llama-3", FIRST),
        ("llava-v1.6-mistral-7b.Q4_K_M", "mmproj-llava-v1.6-mistral-7b-f16", 4096, True, "mistral", (*FIRST, NEWLINE)),
        ("llava-v1.6-vicuna-13b.Q4_K_M", "mmproj-llava-v1.6-7b-f16", 5120, True, "vicuna_v1", (*FIRST, NEWLINE)),
        ("llava-1.6-34b-q5_k", "mmproj-llava-1.6-34b-f16", 7168, True, "chatml", (*FIRST, NEWLINE)),
    ],
)  # fmt: skip
def test_a_published_llava_is_taken_for_what_it_is(
    text: str, mmproj: str, width: int, tiled: bool, prompt: str, mended: tuple[str, ...], folder: Path
) -> None:
    found = pair(build(folder, text), [build(folder, mmproj, width=width)])
    how = style(found.text, found.projector.info)
    assert (found.tiled, how.name, how.pad) == (tiled, prompt, not tiled)
    faults = found.projector.faults
    assert len(faults) == len(mended), faults
    for part in mended:
        assert any(fault.startswith(part) for fault in faults), (part, faults)
    assert f"a LLaVA-1.{6 if tiled else 5} with {mmproj}.gguf; mended in a copy" in said(found, how)


@pytest.mark.parametrize("name", whole_listings())
def test_a_listing_has_as_many_keys_and_tensors_as_its_source_says(name: str, folder: Path) -> None:
    n_keys, n_tensors = said_counts(name)
    assert len(listed(name)) == n_keys
    header = Header.read(build(folder, name, width=0 if "sharegpt4v" in name else 4096))
    if header.tensors:
        assert len(header.tensors) == n_tensors


@pytest.mark.parametrize(
    ("mmproj", "message"),
    [
        ("mmproj-mobilevlm", r"the projector of MobileVLM \('ldp'\), expected a LLaVA's, 'mlp'"),
        ("mmproj-mobilevlm-v2", r"the projector of MobileVLM V2 \('ldpv2'\)"),
        ("mmproj-minicpm-v-2", r"the projector of MiniCPM-V \('resampler'\)"),
        ("mmproj-minicpm-v-2.6", r"the projector of MiniCPM-V \('resampler'\)"),
        ("mmproj-qwen2.5-vl", r"the projector of Qwen2-VL \('qwen2vl_merger'\)"),
        ("mmproj-gemma-3", r"the projector of Gemma 3 \('gemma3'\)"),
        ("mmproj-sharegpt4v-7b", "a vision tower without a projector"),
    ],
)
def test_another_models_projector_is_refused_by_its_name(mmproj: str, message: str, folder: Path) -> None:
    text = build(folder, "llava-v1.5-7b-Q4_K")
    projector = build(folder, mmproj, width=0)
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(text, mmproj=projector)
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match="an mmproj alone, the vision part of a model"):
        open_bundle(projector)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("moondream2-text-model-f16", "Phi-2"),
        ("minicpm-v-2", "MiniCPM"),
        ("phi-3.5-mini", "Phi-3"),
        ("llama-3.2-11b-vision", "Llama 3.2 Vision"),
        ("internvl3-14b", "Qwen2"),
    ],
)
def test_another_text_model_is_refused_by_its_name(text: str, name: str, folder: Path) -> None:
    with pytest.raises(
        BundleError, match=rf"a text model of architecture '\w+' \({name}\), expected 'llama'"
    ):
        text_model(build(folder, text))


def test_a_projector_of_another_width_is_refused(folder: Path) -> None:
    text = build(folder, "llava-v1.6-vicuna-13b.Q4_K_M")
    with pytest.raises(
        BundleError, match=r"projects to width 4096, .* has 5120; it belongs to another model"
    ):
        open_bundle(text, mmproj=build(folder, "mmproj-llava-v1.6-7b-f16"))
    mobile = build(folder, "mobilevlm-v2-1.7b-q4_k")
    with pytest.raises(BundleError, match=r"a text model alone, found no mmproj beside it|projects to width"):
        open_bundle(mobile)


def test_a_plan_of_mozillas_pair_needs_its_headers_only(folder: Path) -> None:
    text, mmproj = build(folder, "llava-v1.5-7b-Q4_K"), build(folder, "mmproj-llava-v1.5-7b-Q4_0")
    planned = Llava.plan(text, mmproj=mmproj, n_ctx=2048, n_gpu_layers=0)
    assert 5.0e9 < planned.total < 6.5e9
    assert planned.model.startswith(str(folder / "cache"))


def test_quantized_positions_give_the_features_of_their_values(folder: Path) -> None:
    """Mozilla's Q4_0 file has every matrix in Q4_0, the position embeddings too."""
    source = demo_bundle().mmproj
    files = [
        quantized(source, folder / f"{name}.gguf", T.Q4_0, back=name == "back") for name in ("q", "back")
    ]
    assert features_move(*files) == 0.0
    assert 0 < features_move(files[0], source) < 0.2


def quantized(source: Path, out: Path, kind: T, *, back: bool) -> Path:
    """The mmproj with quantized positions. back: their values as F32 again."""
    name = "v.position_embd.weight"
    rows = next(t.data for t in GGUFReader(source).tensors if t.name == name)
    data = quants.quantize(np.array(rows, np.float32), kind)
    new = (quants.dequantize(data, kind), T.F32) if back else (data, kind)
    return rewritten(source, out, data={name: new})

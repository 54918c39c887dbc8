"""Against transformers in float32, computed here and now: `make reference`. Also keeps the recording true."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
import recorded
from prompts import PROMPTS, for_transformers, messages
from stock import stock_answers, stock_features

from pocketllava import Bundle, Llava, Message, Options
from pocketllava.convert import convert
from pocketllava.prompt.items import shared
from pocketllava.vision import image

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
GREEDY = Options(max_tokens=recorded.N_TOKENS)


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> bool:
    """Whether --record was given."""
    return bool(request.config.getoption("--record"))


def judge(name: str, value: Any, record: bool) -> None:
    """Hold the recording to what transformers gives now, or write it."""
    if record:
        recorded.keep(name, value)
        recorded.keep(
            "versions",
            {
                p: importlib.metadata.version(p)
                for p in ("transformers", "torch", "tokenizers", "pillow", "numpy", "llama-cpp-python")
            },
        )
    assert recorded.load()[name] == value, f"recording of {name} is stale: pytest -m reference --record"


def processor_of(folder: Path) -> Any:
    """transformers' processor."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def model_of(folder: Path) -> Any:
    """transformers' model in float32."""
    import torch
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def opened(data: bytes) -> Any:
    """A picture as transformers.image_utils.load_image gives it: upright, RGB."""
    from PIL import Image
    from transformers.image_utils import load_image

    return load_image(Image.open(io.BytesIO(data)))


def features_of(model: Any, processor: Any, data: bytes, rounded: bool = False) -> np.ndarray[Any, Any]:
    """(n_patches, n_embd) float32 after the projector; `rounded` pixels are F16."""
    import torch

    values = processor.image_processor(opened(data), return_tensors="pt").pixel_values
    with torch.no_grad():
        found = model.get_image_features(values.half().float() if rounded else values)
    found = getattr(found, "pooler_output", found)
    return np.asarray(found[0], dtype=np.float32)


def answer_of(model: Any, processor: Any, data: bytes) -> tuple[list[int], list[Any]]:
    """(greedy token ids, logits at each step)."""
    import torch

    text = processor.apply_chat_template(
        for_transformers([("user", recorded.QUESTION, 1)]), add_generation_prompt=True
    )
    inputs = processor(images=opened(data), text=text, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=recorded.N_TOKENS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    eos = processor.tokenizer.eos_token_id
    return ids[: ids.index(eos)] if eos in ids else ids, [np.asarray(step[0]) for step in out.logits]


def test_pixels(make_checkpoint: Any, bundle: Bundle, record: bool) -> None:
    processor = processor_of(make_checkpoint())
    hashes = {}
    for name, data in pictures.twelve().items():
        values = processor.image_processor(
            opened(data), do_rescale=False, do_normalize=False, return_tensors="np"
        )
        expected = np.moveaxis(values["pixel_values"][0], 0, -1)
        found = image.preprocess(data, bundle.preprocessing)
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected), name
        hashes[name] = hashlib.sha256(found.tobytes()).hexdigest()
    judge("pixels", hashes, record)


def test_pixels_of_a_padding_processor(tmp_path: Path) -> None:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    from pocketllava.models.preprocessing import preprocessing

    processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336},
    )  # fmt: skip
    how = preprocessing({"preprocessor_config.json": processor.to_dict()}, 336)
    assert how.pad_to_square
    for name, data in pictures.twelve().items():
        values = processor(opened(data), do_rescale=False, do_normalize=False, return_tensors="np")
        expected = np.moveaxis(values["pixel_values"][0], 0, -1)
        assert np.array_equal(image.preprocess(data, how), expected), name


@pytest.mark.parametrize(
    "layout",
    [{}, {"tokenizer_model": False}, {"scheme": "first", "tokenizer_model": False}],
    ids=["tokenizer.model", "tokenizer.json", "prepend_scheme first"],
)
def test_token_ids(make_checkpoint: Any, make_bundle: Any, layout: dict[str, Any], record: bool) -> None:
    processor = processor_of(make_checkpoint(**layout))
    expected = {}
    with Llava.load(make_bundle(**layout).folder) as llava:
        for name, turns in PROMPTS.items():
            text = processor.apply_chat_template(for_transformers(turns), add_generation_prompt=True)
            expected[name] = processor.tokenizer(text).input_ids
            with llava.session() as session:
                found = session.count(messages(turns))
            ids = [i if isinstance(i, int) else recorded.image_token() for i in found]
            assert ids == expected[name], name
    judge("token ids, " + (layout.get("scheme") or "prepend"), expected, record)


@pytest.mark.parametrize(("mmproj", "bound"), [("F32", 1e-3), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 2e-2)])
def test_features(make_checkpoint: Any, make_bundle: Any, mmproj: str, bound: float, record: bool) -> None:
    folder, bundle = make_checkpoint(), make_bundle("F16", mmproj)
    model, processor = model_of(folder), processor_of(folder)
    picture = pictures.four()[0]
    expected = features_of(model, processor, picture)
    with Llava.load(bundle.folder) as llava:
        error = recorded.relative_error(llava.image_features(picture), expected)
        stock = stock_features(llava, image.preprocess(picture, bundle.preprocessing))
    print(f"\n{mmproj}: relative error {error:.2e}, stock {recorded.relative_error(stock, expected):.2e}")
    assert error <= bound
    if record:
        np.save(recorded.FEATURES_FILE, expected[recorded.FEATURE_ROWS])
    assert recorded.relative_error(recorded.features(), expected[recorded.FEATURE_ROWS]) < 1e-6


def test_what_ggml_rounds(make_checkpoint: Any, make_bundle: Any) -> None:
    """Where the difference with an F32 mmproj comes from.

    On CPUs ggml rounds the pixels to F16 (im2col), and looks both GELUs up in F16 tables, the projector's
    by the tanh formula. Given the same roundings, transformers comes within 1e-4 of us: a value at the edge
    of two F16 steps falls on either side, which no emulation can foresee.
    """
    import torch

    folder, bundle = make_checkpoint(), make_bundle("F16", "F32")
    model, processor = model_of(folder), processor_of(folder)
    picture = pictures.four()[0]
    with Llava.load(bundle.folder) as llava:
        features = llava.image_features(picture)
    errors = {"exact": recorded.relative_error(features, features_of(model, processor, picture))}
    model.model.multi_modal_projector.act = torch.nn.GELU(approximate="tanh")
    errors["tanh"] = recorded.relative_error(features, features_of(model, processor, picture))
    model.model.multi_modal_projector.act = f16_table()
    for block in model.modules():
        if hasattr(block, "activation_fn"):
            block.activation_fn = f16_table(quick=True)
    errors["F16 tables"] = recorded.relative_error(features, features_of(model, processor, picture))
    found = features_of(model, processor, picture, rounded=True)
    errors["F16 tables and pixels"] = recorded.relative_error(features, found)
    print("\nF32 mmproj against transformers: " + ", ".join(f"{name} {e:.2e}" for name, e in errors.items()))
    assert errors["F16 tables and pixels"] <= 1e-4


def test_everything_but_the_gelus(make_checkpoint: Any, tmp_path: Path) -> None:
    """With the MLPs of the tower silenced and the projector's GELU where it is the identity, 1e-5 holds."""
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint(seed=5), folder)
    weights = load_file(folder / "model.safetensors")
    for name, array in weights.items():
        if "mlp.fc2.weight" in name and name.startswith("vision_tower"):
            array[:] = 0
        if name.endswith("linear_1.bias"):
            array[:] = 30  # GELU(x) = x from 10 on, in both
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    bundle = convert(folder, tmp_path / "bundle", quant="F16", mmproj="F32")
    model, processor = model_of(folder), processor_of(folder)
    picture = pictures.four()[1]
    expected = features_of(model, processor, picture, rounded=True)
    with Llava.load(bundle.folder) as llava:
        found = llava.image_features(picture)
    constant = expected.mean(axis=0)  # 30 makes it large, and it says nothing of the image
    error = recorded.relative_error(found - constant, expected - constant)
    print(f"\nF32 mmproj without GELUs: {error:.2e}")
    assert error <= 1e-5


def f16_table(quick: bool = False) -> Any:
    """ggml's GELUs on CPUs: x rounded to F16, the formula, the result rounded to F16 (ggml_vec_gelu_f32)."""
    import torch

    class Table(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            h = x.half().float()
            y = h * torch.sigmoid(1.702 * h) if quick else torch.nn.functional.gelu(h, approximate="tanh")
            return y.half().float()

    return Table()


@pytest.mark.parametrize("name", recorded.ANSWERED)
def test_answers(make_checkpoint: Any, make_bundle: Any, name: str, record: bool) -> None:
    layout, quant, mmproj = recorded.ANSWERED[name]
    folder, bundle = make_checkpoint(**layout), make_bundle(quant, mmproj, **layout)
    model, processor = model_of(folder), processor_of(folder)
    expected = [answer_of(model, processor, data) for data in pictures.four()]
    with Llava.load(bundle.folder) as llava:
        found = [
            list(llava.ask(data, recorded.QUESTION, options=GREEDY).token_ids) for data in pictures.four()
        ]
    stock = stock_answers(bundle, pictures.four(), recorded.QUESTION, recorded.N_TOKENS)
    ids = [ids for ids, _ in expected]
    total, equal = sum(map(len, ids)), sum(shared(f, e) for f, e in zip(found, ids, strict=True))
    stock_equal = sum(shared(s, e) for s, e in zip(stock, ids, strict=True))
    print(f"\n{name}: {equal} of {total} tokens equal transformers', stock handler {stock_equal} of {total}")
    for answer, (wanted, logits) in zip(found, expected, strict=True):
        recorded.assert_equal_or_tie(answer, wanted, recorded.ties_of(logits))
    judge(f"answers, {name}", ids, record)
    if record:
        recorded.keep(f"ties, {name}", [recorded.ties_of(logits) for _, logits in expected])


def test_a_conversation_about_two_images(make_checkpoint: Any, make_bundle: Any) -> None:
    import torch

    folder, bundle = make_checkpoint(), make_bundle("F16", "F16")
    model, processor = model_of(folder), processor_of(folder)
    first, second = pictures.four()[:2]
    turns = PROMPTS["images in two turns"]
    text = processor.apply_chat_template(for_transformers(turns), add_generation_prompt=True)
    inputs = processor(images=[opened(first), opened(second)], text=text, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=recorded.N_TOKENS, do_sample=False)
    expected = out[0, inputs["input_ids"].shape[1] :].tolist()
    pair = iter((first, second))
    conversation = [Message(role, said, tuple(next(pair) for _ in range(n))) for role, said, n in turns]  # type: ignore[arg-type]
    with Llava.load(bundle.folder) as llava:
        assert list(llava.chat(conversation, options=GREEDY).token_ids) == expected

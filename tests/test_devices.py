"""Devices without having one: lines that llama.cpp logged, and plans for machines that are not here.

What needs a device is in tests/devices/.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import GIGA, machine

from pocketllava import Bundle, Llava, OutOfMemory, UnsupportedOption
from pocketllava.commands.show import drift_line
from pocketllava.engine.placing import device_shortage, require_named
from pocketllava.llamacpp.devices import address_of, gpus
from pocketllava.llamacpp.load_log import missing_part, text_device, vision_device
from pocketllava.llamacpp.log import unremarked
from pocketllava.measure.device_drift import DeviceDrift
from pocketllava.models.machine import Device, Machine
from pocketllava.models.placement import MEMORY
from pocketllava.models.plan import plan
from pocketllava.types import LoadOptions
from pocketllava.vision.encoder import VisionEncoder

CARDS = ["CUDA0 (a card)", "CUDA1 (another)"]
no_device = pytest.mark.skipif(bool(gpus()), reason="this build has a device")


def layers(*devices: str) -> list[str]:
    """As llama_model_base::load_tensors logs them, one a layer."""
    return [f"load_tensors: layer {n:3} assigned to device {d}, is_swa = 0" for n, d in enumerate(devices)]


@pytest.mark.parametrize(
    ("lines", "names", "expected"),
    [
        (layers("CUDA0", "CUDA0", "CUDA0"), CARDS, "CUDA0 (a card), 3/3 layers"),
        (layers("CPU", "CUDA1", "CUDA1"), CARDS, "CUDA1 (another), 2/3 layers"),
        (layers("CUDA0", "CUDA0", "CUDA1"), CARDS, "CUDA0 (a card) 2 + CUDA1 (another) 1, 3/3 layers"),
        (layers("CPU", "CPU", "CPU"), CARDS, "CPU, 8 threads"),
        ([*layers("CPU", "CPU"), "load_tensors: offloaded 2/2 layers to GPU"], CARDS, "CPU, 8 threads"),
        (layers("Vulkan0", "Vulkan0"), [], "CPU, 8 threads"),
        (["load_tensors: offloaded 12/33 layers to GPU"], CARDS, "CUDA0 (a card), 12/33 layers"),
        (["load_tensors: offloaded 0/33 layers to GPU"], CARDS, "CPU, 8 threads"),
        (["llama_model_loader: loaded meta data"], CARDS, "CPU, 8 threads"),
    ],
)
def test_where_the_text_model_is(lines: list[str], names: list[str], expected: str) -> None:
    said = ["something before", *lines, *["something behind"] * 1000]
    assert text_device(said, names, 8) == expected


@given(st.lists(st.sampled_from(["CPU", "CUDA0", "CUDA1"]), min_size=1), st.lists(st.text(), max_size=3))
def test_every_layer_on_a_device_is_counted(held: list[str], noise: list[str]) -> None:
    said = text_device([*noise, *layers(*held), *noise], CARDS, 2)
    n = len(held) - held.count("CPU")
    assert said == "CPU, 2 threads" if not n else said.endswith(f", {n}/{len(held)} layers")
    for device in CARDS:
        assert (device in said) == (device[:5] in held)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("clip_ctx: CLIP using CUDA1 backend", "CUDA1 (another)"),
        ("clip_ctx: CLIP using MTL0 backend", "MTL0"),
        ("clip_ctx: CLIP using CPU backend", "CPU"),
        ("load_hparams: projector: mlp", "CPU"),
    ],
)
def test_where_the_vision_tower_is(line: str, expected: str) -> None:
    assert vision_device([line], CARDS) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("llama_model_load: error loading model: unable to allocate Vulkan0 buffer", "weights"),
        (
            "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache",
            "KV cache",
        ),
        (
            "llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers",
            "buffers",
        ),
        ("graph_reserve: failed to allocate compute buffers", "buffers"),
        ("llama_model_load: error loading model: missing tensor 'blk.0.attn_norm.weight'", None),
    ],
)
def test_the_part_that_found_no_memory(line: str, expected: str | None) -> None:
    assert missing_part(["load_tensors: offloading output layer to GPU", line]) == expected


def two_cards(free: int = 8 * GIGA, *, sums_in_f32: bool = True) -> Machine:
    cards = [Device(name, free, free, backend="CUDA", sums_in_f32=sums_in_f32) for name in CARDS]
    return replace(machine(), devices=tuple(cards))


def test_one_card_of_several_and_the_towers_own(bundle: Bundle) -> None:
    both = plan(bundle, LoadOptions(), two_cards())
    assert {part.where for part in both.parts} == {"CUDA0 (a card) + CUDA1 (another)", MEMORY}
    second = plan(bundle, LoadOptions(main_gpu=1), two_cards())
    assert (second.vision_device, {part.where for part in second.parts}) == (CARDS[1], {CARDS[1], MEMORY})
    apart = plan(bundle, LoadOptions(main_gpu=0, mmproj_device="cuda1"), two_cards())
    where = {part.name: part.where for part in apart.parts if part.where != MEMORY}
    assert (where["weights"], where["vision tower"], apart.vision_device) == (CARDS[0], CARDS[1], CARDS[1])
    assert {room.where for room in apart.rooms} == {*CARDS, MEMORY}
    alone = plan(bundle, LoadOptions(n_gpu_layers=0, mmproj_device="CUDA1"), two_cards())
    assert (alone.n_gpu_layers, alone.vision_device) == (0, CARDS[1])
    assert plan(bundle, LoadOptions(mmproj_device="cpu"), two_cards()).vision_device is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"main_gpu": 2}, r"^main_gpu: found 2, expected the number of one of CUDA0 \(a card\), CUDA1"),
        (
            {"mmproj_device": "CUDA7"},
            r"^mmproj_device: found 'CUDA7', expected 'cpu' or the name of one of CUDA0",
        ),
        ({"tensor_split": (1, 1, 1)}, r"^tensor_split: found 3 shares, expected at most one for each"),
        ({"main_gpu": 0, "tensor_split": (1, 1)}, r"^tensor_split: expected several GPUs to split over"),
    ],
)
def test_devices_that_are_not_there_are_named(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedOption, match=message):
        plan(bundle, LoadOptions(**options), two_cards())


def test_exact_answers_keep_the_tower_where_sums_are_exact(bundle: Bundle) -> None:
    rough = two_cards(sums_in_f32=False)
    assert plan(bundle, LoadOptions(exact=True), rough).vision_device is None
    assert plan(bundle, LoadOptions(exact=False), rough).vision_device == CARDS[0]
    assert plan(bundle, LoadOptions(exact=True), two_cards()).vision_device == CARDS[0]
    with pytest.raises(UnsupportedOption, match=r"^exact: CUDA0 \(a card\), found sums in F16"):
        plan(bundle, LoadOptions(exact=True, mmproj_device="CUDA0"), rough)


def test_exact_is_the_default_of_types_that_promise_tokens(make_bundle: Any, bundle: Bundle) -> None:
    rough = two_cards(sums_in_f32=False)
    assert bundle.manifest.types.model in ("F32", "F16", "BF16")
    assert plan(bundle, LoadOptions(), rough).vision_device is None
    quantized = make_bundle("Q8_0", "F16")
    assert plan(quantized, LoadOptions(), rough).vision_device == CARDS[0]


def test_what_stays_on_the_cpu_is_said(bundle: Bundle) -> None:
    options = LoadOptions(main_gpu=0)
    whole = plan(bundle, options, two_cards())
    assert device_shortage(whole, options, exact=True) is None
    held = sum(part.n_bytes for part in whole.parts if part.where != MEMORY)
    some = plan(bundle, options, two_cards(round(held / 0.9) - (1 << 20)))
    said = device_shortage(some, options, exact=True)
    assert said is not None
    assert f"too little for {5 - some.n_gpu_layers} of 5 layers, which the CPU computes instead" in said
    none = plan(bundle, options, two_cards(1 << 20))
    asked = LoadOptions(n_gpu_layers=2)
    assert "for the vision tower, which" in (
        device_shortage(plan(bundle, asked, two_cards(4 << 20)), asked, exact=True) or ""
    )
    named = LoadOptions(mmproj_device="CUDA0")
    with pytest.raises(OutOfMemory, match=r"mmproj_device CUDA0 \(a card\) has .* free, expected"):
        require_named(plan(bundle, named, two_cards(1 << 20)), named)
    require_named(whole, named)
    assert "too little for 5 of 5 layers and the vision tower" in (
        device_shortage(none, options, exact=True) or ""
    )


def test_features_of_one_device_are_no_others(bundle: Bundle) -> None:
    """What is kept on disk is named by the kind of device; the CPU's names stay what they were."""
    kinds = {
        Device(name, 0, 0, backend="Vulkan", sums_in_f32=f32).kind for name in CARDS for f32 in (True, False)
    }
    assert kinds == {"Vulkan a card F32", "Vulkan a card F16", "Vulkan another F32", "Vulkan another F16"}
    with Llava.load(bundle.folder, n_gpu_layers=0, n_ctx=256) as llava, llava.session() as session:
        assert isinstance(session.vision, VisionEncoder)
        assert session.vision.kind == ""


@no_device
def test_without_a_device_nothing_is_tried(bundle: Bundle) -> None:
    with pytest.raises(
        UnsupportedOption, match=r"^mmproj_device: found 'CUDA0', expected 'cpu' or the name of a"
    ):
        Llava.load(bundle.folder, mmproj_device="CUDA0")
    with pytest.raises(UnsupportedOption, match="main_gpu: found 0, expected the number of a device"):
        Llava.load(bundle.folder, main_gpu=0)
    with Llava.load(bundle.folder, exact=True, mmproj_device="cpu", n_ctx=256) as llava:
        assert llava.devices[1] == "CPU"
        assert np.isfinite(llava.image_features(np.zeros((8, 8, 3), np.uint8))).all()
    with pytest.raises(Exception, match="no such device"):
        address_of("CUDA0")


def test_a_devices_drift_in_words() -> None:
    line = drift_line(DeviceDrift("CUDA0 (a card)", 0.0065, sums_in_f32=False, taken=False))
    assert line.startswith(
        "features on CUDA0 (a card): 6.5e-03 from the CPU's, sums in F16; the vision tower runs on"
    )
    assert "no room" in drift_line(DeviceDrift("CUDA0", None, sums_in_f32=True, taken=False))


def test_what_is_tried_leaves_no_complaint_and_loses_no_line(capfd: pytest.CaptureFixture[str]) -> None:
    with unremarked():
        os.write(2, b"ggml_vulkan: Device memory allocation of size 11000000 failed.\n")
        with unremarked():
            os.write(2, b"another thread's line\n")
    os.write(2, b"behind\n")
    assert capfd.readouterr().err == "another thread's line\nbehind\n"

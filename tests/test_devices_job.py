"""What `make devices` does before it has a device: the old headers, what the system lacks, how endings are judged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from devices import machine, wheel
from devices.matrix import Ending, judged

SOURCE = """\
    VkBool32 enable_best_practice = layer_settings;
    std::vector<vk::LayerSettingEXT> settings = { {"VK_LAYER_KHRONOS_validation", 1, &enable_best_practice}, };
    vk::LayerSettingsCreateInfoEXT layer_setting_info(settings);
    vk::InstanceCreateInfo instance_create_info(vk::InstanceCreateFlags{}, &app_info, layers, &layer_setting_info);
#ifdef __APPLE__
"""


def test_old_headers_get_an_instance_without_layer_settings(tmp_path: Path) -> None:
    file = tmp_path / "ggml-vulkan.cpp"
    file.write_text(f"before\n{SOURCE}behind\n")
    wheel.fit_old_headers(file)
    assert file.read_text() == f"before\n    {wheel.PLAIN}\n#ifdef __APPLE__\nbehind\n"
    with pytest.raises(SystemExit, match=r"found 0 places .* install Vulkan headers 1\.3\.272 or later"):
        wheel.fit_old_headers(file)


@pytest.mark.skipif(sys.platform != "linux", reason="the job is Linux's")
def test_what_the_system_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {"a C compiler (cc)", "Vulkan's headers (vulkan/vulkan.h)"} <= set(machine.missing(builds=False))
    assert "the shader compiler glslc" in machine.missing(builds=True)
    assert "the shader compiler glslc" not in machine.missing(builds=False)


@pytest.mark.parametrize(
    ("ending", "word"),
    [
        (Ending(0, "A dog.", "warning: takes the CPU\n"), "answer"),
        (Ending(0, "", ""), "no answer"),
        (Ending(1, "", "Plan\n  parts\nerror: too large\n"), "one line"),
        (Ending(1, "", ""), "0 lines"),
        (Ending(1, "", "error: a\nerror: b\n"), "2 lines"),
        (Ending(1, "", "error: the load test ended with SIGABRT\n"), "SIGABRT"),
        (Ending(0, "A dog.", "ggml_vulkan: Device memory allocation of size 1 failed.\n"), "ggml"),
        (Ending(-6, "", "ggml.c:1: GGML_ASSERT(x) failed\n"), "signal 6"),
        (Ending(139, "A dog.", ""), "signal 11"),
    ],
)
def test_how_an_ending_is_judged(ending: Ending, word: str) -> None:
    assert ending.word == word
    assert judged(ending, Ending(0, "A cat.", "")) == (word if word != "answer" else "another answer")

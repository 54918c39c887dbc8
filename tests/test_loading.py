"""What a loaded model runs on: llama.cpp's own words for it, and what happens where a GPU is too small."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from pocketllava import BackendError, Bundle, Llava, UnsupportedOption
from pocketllava.engine.loading import or_on_cpu
from pocketllava.llamacpp import private
from pocketllava.llamacpp.devices import cores, gpus
from pocketllava.llamacpp.log import log_lines

CUDA = ["CUDA0 (NVIDIA RTX 4070)"]


def test_no_line_is_lost_however_many_follow(bundle: Bundle) -> None:
    """A 7B model logs more than 200 lines after the one that says where its layers are."""
    with log_lines() as lines:
        for _ in range(4):
            Llava.load(bundle.folder, n_ctx=256).close()
    assert sum("n_ctx" in line for line in lines) >= 4
    assert len(lines) > 300


DROPPED = """
import gc
import psutil
from pocketllava import Llava

for n in range(10):
    llava = Llava.load("demo", n_ctx=256, n_threads=1, weights="memory")
    del llava
    gc.collect()  # a loaded model holds itself by a cycle
    if n == 3:
        before = psutil.Process().memory_info().rss
print(psutil.Process().memory_info().rss - before)
"""


def test_a_model_without_close_is_freed() -> None:
    """llama_cpp frees its own model with the object; the vision tower, of 7 MB, is ours."""
    command = [sys.executable, "-c", DROPPED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 14_000_000  # after six more


def test_a_model_too_large_for_the_gpu_is_loaded_on_the_cpu(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[int] = []

    def load(layers: int) -> str:
        tried.append(layers)
        if layers:
            raise BackendError("ggml_cuda: out of memory")
        return "loaded"

    with caplog.at_level(logging.WARNING):
        assert or_on_cpu(load, -1, bundle, CUDA) == "loaded"
    assert tried == [-1, 0]
    assert "does not load on CUDA0 (NVIDIA RTX 4070): using the CPU" in caplog.text
    assert "out of memory" in caplog.text
    with pytest.raises(BackendError):
        or_on_cpu(load, 12, bundle, CUDA)  # so many layers were asked for
    assert tried == [-1, 0, 12]


@pytest.mark.skipif(bool(gpus()), reason="this build has a GPU")
def test_layers_on_a_gpu_that_is_not_there(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedOption, match="built for CPUs only"):
        Llava.load(bundle.folder, n_gpu_layers=1)
    with Llava.load(bundle.folder) as llava:
        assert llava.devices[0].startswith(f"CPU, {cores()} thread")
        assert llava.devices[1] == "CPU"


def test_every_private_name_of_llama_cpp_is_there() -> None:
    """The one list of what an upgrade of llama-cpp-python may break."""
    for module, names in private.MODULE_NAMES.items():
        for name in names:
            assert private.private(module, name) is not None
    with pytest.raises(KeyError, match="is not listed"):
        private.private("llama_cpp.llama", "_something_else")


def test_a_name_that_moved_is_one_message() -> None:
    class Llama:
        """Of a version to come."""

    with pytest.raises(BackendError, match=r"no Llama\.input_ids, expected a version >=0\.3\.36,<0\.4"):
        private.check_llama(Llama())

"""What a loaded model runs on: llama.cpp's own words for it, and what happens where a GPU is too small."""

from __future__ import annotations

import logging
import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from pocketllava import BackendError, Bundle, Llava, UnsupportedOption
from pocketllava.engine.loading import or_on_cpu
from pocketllava.llamacpp import private
from pocketllava.llamacpp.devices import cores, gpus
from pocketllava.llamacpp.log import log_lines
from pocketllava.llamacpp.text_model import TextModel

CUDA = ["CUDA0 (NVIDIA RTX 4070)"]


def test_no_line_is_lost_however_many_follow(bundle: Bundle) -> None:
    """A 7B model logs more than 200 lines after the one that says where its layers are."""
    with log_lines() as lines:
        for _ in range(4):
            Llava.load(bundle.folder, n_ctx=256).close()
    assert sum("n_ctx" in line for line in lines) >= 4
    assert len(lines) > 300


def huge_bytes() -> int:
    """Of this process's memory, what may have huge pages (proc_pid_smaps(5): hg)."""
    kb = total = 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        kb = int(value.split()[0]) if name == "Size" else kb
        total += kb * 1024 if name == "VmFlags" and "hg" in value.split() else 0
    return total


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no huge pages to ask for",
)
def test_large_buffers_get_huge_pages_and_what_others_have_does_not(bundle: Bundle) -> None:
    """A KV cache of 64 MB, beside memory of the program that loads the model, and buffers that are not filled."""
    with mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE) as of_the_program:
        before = huge_bytes()
        info = bundle.text_info
        position = 2 * info.n_layer * info.n_head_kv * info.head_size * 2  # bytes of keys and values in F16
        text, _ = TextModel.load(bundle.model, n_ctx=(64 << 20) // position, n_threads=1, info=info)
        added = huge_bytes() - before
        text.close()
        assert len(of_the_program) == 64 << 20
    assert 60 << 20 <= added < 70 << 20


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


@pytest.mark.skipif(not gpus(), reason="this build has no GPU")
def test_all_layers_on_a_device_or_none(bundle: Bundle) -> None:
    with Llava.load(bundle.folder) as llava:
        assert llava.devices[0].startswith(f"{gpus()[0]}, ")
    with Llava.load(bundle.folder, n_gpu_layers=0) as llava:
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

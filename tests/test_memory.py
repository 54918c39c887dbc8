"""What a bundle takes is known before it is loaded, and its weights are held once."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pictures
import pytest
from click.testing import CliRunner
from machines import ARM, AVX2, machine

from pocketllava import Bundle, Llava, Options, UnsupportedOption
from pocketllava.cli import cli
from pocketllava.llamacpp.log import logger as llama_log
from pocketllava.models.memory import memory
from pocketllava.models.plan import plan
from pocketllava.types import LoadOptions

SHORT = Options(max_tokens=6)
MIB, GIGA = 1 << 20, 10**9


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("n_ctx", [256, 2048, 4096])
def test_the_kv_cache_is_as_large_as_llama_cpp_says(
    bundle: Bundle, n_ctx: int, kv_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, llama_log.name):
        Llava.load(bundle.folder, n_ctx=n_ctx, kv_type=kv_type).close()
    said = re.search(r"KV buffer size = +([0-9.]+) MiB", caplog.text)
    assert said
    assert memory(bundle, n_ctx, kv_type).kv_cache == pytest.approx(float(said[1]) * MIB, abs=0.01 * MIB)


def test_weights_are_counted_from_the_files(bundle: Bundle) -> None:
    needed, files = memory(bundle), bundle.manifest.files
    for name, counted in (("model.gguf", needed.text), ("mmproj.gguf", needed.vision)):
        assert 0.9 * files[name].bytes < counted < files[name].bytes
    parts = needed.text + needed.vision + needed.kv_cache + needed.buffers + needed.vision_buffers
    assert needed.total == parts + needed.picture + needed.vocabulary + needed.process
    with pytest.raises(UnsupportedOption, match="n_ctx: found 5000, expected 1 to 4096"):
        memory(bundle, 5000)


@pytest.mark.parametrize(
    ("quant", "avx2", "arm"), [("F16", False, False), ("Q4_K_M", True, True), ("Q8_0", False, True)]
)
def test_weights_that_the_cpu_rearranges_are_read_and_others_mapped(
    make_bundle: Any, quant: str, avx2: bool, arm: bool
) -> None:
    bundle = make_bundle(quant)
    for cpu, expected in ((AVX2, avx2), (ARM, arm)):
        assert plan(bundle, LoadOptions(), machine(cpu=cpu, releases_pages=False)).in_memory == expected
        assert not plan(bundle, LoadOptions(), machine(cpu=cpu, releases_pages=True)).in_memory
        assert not plan(bundle, LoadOptions(), machine(cpu=cpu, gpu=8 * GIGA)).in_memory


def test_it_makes_no_difference_to_the_answer_how_weights_are_held(make_bundle: Any) -> None:
    answers = set()
    for weights, shown in (("memory", "weights in memory"), ("mapped", "weights mapped")):
        with Llava.load(make_bundle("Q4_K_M").folder, weights=weights) as llava:
            answer = llava.ask(pictures.four()[0], "What is it?", options=SHORT)
            answers.add(answer.token_ids)
            assert shown in answer.timings.devices[0]
    assert len(answers) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not truncate a file that is open")
def test_weights_in_memory_outlive_their_file(bundle: Bundle, tmp_path: Path) -> None:
    """A mapped file that is truncated ends the process."""
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    with Llava.load(folder, weights="memory") as llava:
        before = llava.ask(pictures.four()[0], "What is it?", options=SHORT).token_ids
        for name in ("model.gguf", "mmproj.gguf"):
            os.truncate(folder / name, 0)
        llava.clear_cache()
        assert llava.ask(pictures.four()[0], "What is it?", options=SHORT).token_ids == before
        assert llava.image_features(pictures.four()[1]).any()


def test_a_quantized_cache_answers_nearly_the_same(make_bundle: Any) -> None:
    """Random weights flip close tokens; the first ones must agree."""
    first = []
    for kv_type in ("f16", "q8_0"):
        with Llava.load("demo", kv_type=kv_type) as llava:
            first.append(llava.ask(pictures.four()[0], "Describe the image.", options=SHORT).token_ids)
    assert first[0] == first[1]


@pytest.mark.parametrize(
    "wrong",
    [{"kv_type": "q4_0"}, {"weights": "both"}, {"keep_prefixes": True}, {"cache_bytes": 0}, {"n_threads": 0}],
)
def test_load_options_are_checked(bundle: Bundle, wrong: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOption, match=next(iter(wrong))):
        Llava.load(bundle.folder, **wrong)


def test_inspect_shows_what_loading_takes(bundle: Bundle) -> None:
    def shown(*arguments: str) -> str:
        return CliRunner().invoke(cli, ["inspect", str(bundle.folder), *arguments]).output

    assert re.search(r"memory: [0-9.]+ MB \(text model .* KV cache of 2048 tokens in f16 ", shown())
    assert "KV cache of 4096 tokens in q8_0 " in shown("--ctx", "4000", "--kv-type", "q8_0")
    assert json.loads(shown("--json"))["memory"]["kv_cache"] == memory(bundle).kv_cache

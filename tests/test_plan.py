"""What loading takes is known before, and what does not fit is said with what would; nothing is loaded for it."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pictures
import pytest
from click.testing import CliRunner
from machines import ARM, GIGA, linux, machine, no_driver

from pocketllava import Bundle, Llava, LoadOptions, OutOfMemory
from pocketllava.cli import cli
from pocketllava.llamacpp.devices import cpu_features, gpus
from pocketllava.llamacpp.log import logger as llama_log
from pocketllava.models.machine import Machine, rearranged_types
from pocketllava.models.memory import batch_size, memory, smaller_contexts
from pocketllava.models.placement import MEMORY
from pocketllava.models.plan import Plan, plan
from pocketllava.models.plan_text import plan_lines, shortage

MIB = 1 << 20
WITHIN = 0.10  # planned against measured


def logged(pattern: str, text: str) -> float:
    """A size in llama.cpp's log, in bytes."""
    said = re.search(rf"{pattern} +([0-9.]+) MiB", text)
    assert said, pattern
    return float(said[1]) * MIB


@pytest.mark.parametrize("n_ctx", [1024, 4096])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize(
    "layout", [{}, {"ffn": 2048}, {"kv_heads": 2, "ffn": 256}, {"vision": 256, "vision_ffn": 1024}]
)
def test_buffers_are_as_large_as_llama_cpp_says(
    make_bundle: Any, layout: dict[str, int], kv_type: str, n_ctx: int, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle("F16", "F16", **layout)
    load: dict[str, Any] = {"n_ctx": n_ctx, "kv_type": kv_type, "n_gpu_layers": 0}
    with caplog.at_level(logging.INFO, llama_log.name), Llava.load(bundle.folder, **load) as llava:
        llava.image_features(pictures.four()[0])
    needed = memory(bundle, n_ctx, kv_type)
    text = logged("sched_reserve: .*compute buffer size =", caplog.text)
    vision = logged("reserve_compute_meta: .*compute buffer size =", caplog.text)
    scores = 4 * batch_size(bundle) * bundle.text_info.n_vocab  # llama_cpp's own
    assert 0.97 * text < needed.buffers + needed.reserved - scores < 1.15 * text
    assert vision <= needed.vision_buffers < 1.6 * vision  # small tensors find holes between large ones


@pytest.mark.skipif(not gpus(), reason="this build has no GPU")
@pytest.mark.parametrize("exact", [True, False])
def test_a_device_has_no_larger_buffers_than_planned(
    make_bundle: Any, exact: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle("F16", "F16")
    with caplog.at_level(logging.INFO, llama_log.name), Llava.load(bundle.folder, exact=exact) as llava:
        text_place, tower = (place.split()[0] for place in llava.devices)
        llava.image_features(pictures.four()[0])
    needed = memory(bundle)
    text = logged(f"sched_reserve: +{text_place} compute buffer size =", caplog.text)
    vision = logged(f"reserve_compute_meta: +{tower} compute buffer size =", caplog.text)
    assert text <= needed.buffers + needed.reserved
    assert vision <= needed.vision_buffers + needed.vision_work


@pytest.mark.parametrize("quant", ["Q4_K_M", "Q4_0", "Q8_0", "F16"])
def test_rearranged_weights_are_those_that_llama_cpp_copies(
    make_bundle: Any, quant: str, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle(quant)
    with caplog.at_level(logging.INFO, llama_log.name):
        Llava.load(bundle.folder, n_gpu_layers=0).close()
    needed = memory(bundle, rearranged_types=rearranged_types(cpu_features()))
    said = re.search(r"CPU_REPACK model buffer size = +([0-9.]+) MiB", caplog.text)
    assert needed.rearranged == pytest.approx(float(said[1]) * MIB if said else 0, abs=0.01 * MIB)


def script() -> Any:
    """benchmarks/planned_memory.py."""
    path = Path(__file__).parent.parent / "benchmarks" / "planned_memory.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@linux
@pytest.mark.slow
@no_driver
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("weights", ["mapped", "memory"])
def test_the_plan_is_what_a_process_takes(make_bundle: Any, weights: str, kv_type: str) -> None:
    for folder, n_ctx in (("demo", 2048), (str(make_bundle("Q4_K_M").folder), 4096)):
        planned, peak, reason = script().measured(folder, n_ctx, kv_type, weights)
        assert not reason
        assert planned == pytest.approx(peak, rel=WITHIN), folder


def needs(bundle: Bundle, **said: Any) -> int:
    """Bytes that must not be swapped."""
    room = next(r for r in plan(bundle, LoadOptions(**said), machine()).rooms if "swap" in r.name)
    return room.needed


def test_what_fits_is_loaded_as_usual(bundle: Bundle) -> None:
    planned = plan(bundle, LoadOptions(), machine())
    assert (planned.verdict, planned.n_ctx, planned.kv_type, planned.chosen) == ("fits", 2048, "f16", ())
    assert planned.total == sum(part.n_bytes for part in planned.parts)
    assert planned.tightest.margin == 16 * GIGA - planned.total
    assert planned.changes == ()


def test_a_smaller_context_comes_before_a_quantized_cache(bundle: Bundle) -> None:
    """No answer changes by the one; close ones may by the other."""
    usual, less = needs(bundle, n_ctx=2048), needs(bundle, n_ctx=1536)
    planned = plan(bundle, LoadOptions(), machine((usual + less) // 2))
    assert (planned.kv_type, planned.verdict) == ("f16", "slow")  # mapped weights can be read again
    assert planned.n_ctx in (1536, 1792)
    assert planned.chosen == (f"n_ctx {planned.n_ctx} instead of 2048",)


def test_a_quantized_cache_comes_where_nothing_else_fits(bundle: Bundle) -> None:
    least = needs(bundle, n_ctx=1024)
    planned = plan(bundle, LoadOptions(), machine(least - 1))
    assert planned.kv_type == "q8_0"
    assert planned.verdict != "too large"
    assert "kv_type q8_0 instead of f16" in planned.chosen


@pytest.mark.parametrize("said", [{"n_ctx": 2048}, {"kv_type": "f16"}, {"flash_attn": "off"}])
def test_what_was_said_is_kept(bundle: Bundle, said: dict[str, Any]) -> None:
    planned = plan(bundle, LoadOptions(**said), machine(needs(bundle, n_ctx=1024) - 1))
    if "n_ctx" in said:
        assert planned.n_ctx == 2048
    else:
        assert planned.kv_type == "f16"


def test_mapped_weights_that_do_not_fit_are_slow_and_held_ones_too_large(bundle: Bundle) -> None:
    free = plan(bundle, LoadOptions(), machine()).total - 1
    assert plan(bundle, LoadOptions(weights="mapped"), machine(free)).verdict == "slow"
    assert (
        plan(bundle, LoadOptions(weights="memory", n_ctx=2048, kv_type="f16"), machine(free)).verdict
        == "too large"
    )
    assert (
        plan(
            bundle, LoadOptions(weights="memory", n_ctx=2048, kv_type="f16"), machine(free, swap=GIGA)
        ).verdict
        == "slow"
    )


def test_layers_that_a_device_has_room_for_go_there(bundle: Bundle) -> None:
    whole = plan(bundle, LoadOptions(), machine(gpu=8 * GIGA))
    assert (whole.n_gpu_layers, whole.n_layers, whole.vision_device) == (5, 5, "GPU0 (a card)")
    on_device = sum(part.n_bytes for part in whole.parts if part.where != MEMORY)
    some = plan(bundle, LoadOptions(), machine(gpu=round(on_device / 0.9) - MIB))
    assert 0 < some.n_gpu_layers < 5
    assert some.verdict == "fits"
    none = plan(bundle, LoadOptions(), machine(gpu=MIB))
    assert (none.n_gpu_layers, none.vision_device) == (0, None)
    assert {part.where for part in none.parts} == {MEMORY}
    asked = plan(bundle, LoadOptions(n_gpu_layers=5), machine(gpu=MIB))
    assert (asked.n_gpu_layers, asked.verdict) == (5, "too large")
    assert asked.changes[-1].how.startswith("--gpu-layers ")


def test_unified_memory_counts_once_for_both(bundle: Bundle) -> None:
    """A Mac's GPU works in the machine's own memory."""
    planned = plan(bundle, LoadOptions(), machine(gpu=8 * GIGA, unified=True))
    free, *_ = planned.rooms
    assert free.needed == planned.total
    apart = plan(bundle, LoadOptions(), machine(gpu=8 * GIGA)).rooms[0]
    assert apart.needed < free.needed


def test_a_map_that_is_not_let_go_of_counts_beside_its_copy(make_bundle: Any) -> None:
    bundle, mapped = make_bundle("Q4_K_M"), LoadOptions(weights="mapped")
    freed = plan(bundle, mapped, machine(cpu=ARM))
    held = plan(bundle, mapped, machine(cpu=ARM, releases_pages=False))
    assert freed.releases_pages
    assert not held.releases_pages
    assert held.total > freed.total
    assert plan(bundle, LoadOptions(weights="memory"), machine(cpu=ARM)).total <= held.total


def test_changes_come_in_the_order_of_harm_each_with_its_figure(bundle: Bundle) -> None:
    planned = plan(bundle, LoadOptions(weights="memory"), machine(limit=10 * MIB))
    assert planned.refused
    hows = [change.how for change in planned.changes]
    wanted = [
        "--weights mapped",
        "--kv-type q8_0",
        "--ctx 1024",
        "convert --mmproj Q8_0",
        "convert --quant Q2_K",
    ]
    assert [how for how in hows if how in wanted] == [how for how in wanted if how in hows]
    assert {"--kv-type q8_0", "--ctx 1024", "convert --quant Q2_K"} <= set(hows)
    assert not any(change.fits for change in planned.changes)
    usual = plan(bundle, LoadOptions(weights="memory"), machine())
    for change in planned.changes:
        assert change.total < usual.total or change.how == "--weights mapped"


def test_a_change_that_is_said_to_fit_does(bundle: Bundle) -> None:
    """The figure of a change is that of a plan made with it."""
    said = LoadOptions(n_ctx=4096, kv_type="f16", weights="memory")
    free = (needs(bundle, n_ctx=4096, weights="memory") + needs(bundle, n_ctx=1024, weights="memory")) // 2
    short = plan(bundle, said, machine(free))
    change = next(c for c in short.changes if c.how.startswith("--ctx"))
    n_ctx = int(change.how.split()[1])
    again = plan(bundle, LoadOptions(n_ctx=n_ctx, kv_type="f16", weights="memory"), machine(free))
    assert (change.fits, again.verdict, again.total) == (True, "fits", change.total)
    assert n_ctx + 256 not in smaller_contexts(n_ctx, 576)
    larger = plan(bundle, LoadOptions(n_ctx=n_ctx + 256, kv_type="f16", weights="memory"), machine(free))
    assert larger.verdict != "fits"


def test_the_text_shows_parts_total_verdict_and_changes(bundle: Bundle) -> None:
    planned = plan(bundle, LoadOptions(), machine(limit=10 * MIB, gpu=None))
    text = str(planned)
    assert text.splitlines() == plan_lines(planned)
    for shown in ("machine  CPU, 4 threads; 16.00 GB free now", "RLIMIT_AS, ulimit -v leaves 10.49 MB", "vision tower",
                  "KV cache, ", "total", "too large: ", "what would take less", "--kv-type q8_0"):  # fmt: skip
        assert shown in text
    assert max(map(len, text.splitlines()[1:])) < 120
    assert "\n" not in shortage(planned)


def test_conversations_to_go_back_to_take_a_part_of_what_is_free(bundle: Bundle) -> None:
    needed = memory(bundle)
    one = plan(bundle, LoadOptions(), machine()).total
    roomy, tight = (plan(bundle, LoadOptions(), machine(one + more)) for more in (40 * GIGA, 0))
    assert roomy.kept == min(4 << 30, 16 * needed.kv_cache)
    assert tight.kept == round(2.5 * needed.prefix)
    assert plan(bundle, LoadOptions(), machine(one + 4 * needed.kv_cache)).kept == needed.kv_cache
    assert plan(bundle, LoadOptions(kept_bytes=7), machine()).kept == 7
    assert roomy.later == needed.full + roomy.kept


def test_fewer_image_tokens_take_less(bundle: Bundle) -> None:
    few, all_of_them = (plan(bundle, LoadOptions(image_tokens=n), machine()) for n in (64, None))
    assert few.total < all_of_them.total
    # more is left to a full context
    assert few.later - few.kept < all_of_them.later - all_of_them.kept + few.total


def test_the_command_prints_what_python_gives(bundle: Bundle) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["plan", str(bundle.folder), *arguments])

    shown = run("--ctx", "1000", "--kv-type", "q8_0")
    assert shown.exit_code == 0, shown.output
    assert "KV cache, 1024 tokens in q8_0" in shown.output
    assert "fits: " in shown.output
    fields = json.loads(run("--json", "--weights", "memory").output)
    planned = Llava.plan(bundle.folder, weights="memory")
    assert (fields["total"], fields["verdict"], fields["n_ctx"]) == (planned.total, "fits", 2048)
    assert fields["margin"] == pytest.approx(planned.tightest.margin, abs=GIGA)
    assert run("--ctx", "5000").exit_code == 1


def test_loading_does_as_planned(bundle: Bundle) -> None:
    planned: Plan = Llava.plan(bundle.folder)
    assert isinstance(planned.machine, Machine)
    with Llava.load(bundle.folder) as llava:
        assert llava.n_ctx == planned.n_ctx
        assert llava.devices[0].endswith("weights in memory" if planned.in_memory else "weights mapped")


TIGHT = """
import logging, resource, sys
from dataclasses import replace
import psutil
from pocketllava import Llava, LoadOptions, OutOfMemory
from pocketllava.engine.loading import planned
from pocketllava.models.limits import Limit
from pocketllava.models.plan import plan
from pocketllava.names import open_bundle

folder, n_ctx, kv_type = sys.argv[1:]
logging.basicConfig(format="%(message)s", stream=sys.stdout)
logging.getLogger("pocketllava.llama").propagate = False
bundle, options = open_bundle(folder), LoadOptions(n_ctx=int(n_ctx), kv_type=kv_type, n_threads=1, n_gpu_layers=0)
here = planned(bundle, options).machine  # loads the libraries
wide = replace(here, limits=(Limit("addresses", 1 << 50, True, True),))
room = plan(bundle, options, wide).rooms[-1].needed
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + room + (2 << 20),) * 2)
try:
    with Llava.load(folder, n_threads=1, n_gpu_layers=0) as llava:
        answer = llava.ask(None, "What is it?", max_tokens=2)
        print(answer.finish_reason, llava.n_ctx, llava.devices[0])
except OutOfMemory as error:
    print(error.plan)
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_process_with_little_room_takes_what_fits_and_says_so(bundle: Bundle, kv_type: str) -> None:
    command = [sys.executable, "-I", "-c", TIGHT, str(bundle.folder), "1024", kv_type]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    warned, loaded = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert "does not fit the memory as usual, takes " in warned, done.stdout
    n_ctx = int(loaded.split()[1])
    assert 1024 <= n_ctx < 2048
    assert f"n_ctx {n_ctx} instead of 2048" in loaded
    assert f"n_ctx {n_ctx} instead of 2048" in warned
    assert ("kv_type q8_0 instead of f16" in loaded) == (kv_type == "q8_0")
    assert ("close answers may differ" in warned) == (kv_type == "q8_0")


@linux
@pytest.mark.slow
def test_a_command_without_room_prints_the_plan(bundle: Bundle) -> None:
    limited = (
        "import resource, sys; from pocketllava.llamacpp.devices import gpus; gpus(); import psutil;"
        " used = psutil.Process().memory_info().vms; resource.setrlimit(resource.RLIMIT_AS, (used + (90 << 20),) * 2);"
        " sys.argv[0] = 'pocketllava'; from pocketllava.cli import main; main()"
    )
    command = [
        sys.executable,
        "-I",
        "-c",
        limited,
        "ask",
        str(bundle.folder),
        "What is it?",
        "--threads=1",
        "--gpu-layers=0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-500:]
    assert done.stdout == ""
    *text, error = done.stderr.splitlines()
    assert error.startswith(f"error: {bundle.folder}: needs about ")
    assert text[0].startswith("model    ")
    assert any(line.startswith("too large: ") for line in text)
    assert any("--kv-type q8_0" in line for line in text)


def test_the_error_carries_the_plan(bundle: Bundle) -> None:
    from pocketllava.engine.loading import out_of_memory

    planned = plan(bundle, LoadOptions(), machine(limit=10 * MIB))
    error = out_of_memory(planned)
    assert isinstance(error, OutOfMemory)
    assert (error.available_bytes, error.plan) == (10 * MIB, str(planned))
    assert error.needed_bytes > error.available_bytes

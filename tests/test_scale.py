"""Several types from one pass, types from a bundle, and conversions that are killed and go on: the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pocketllava import Bundle, ConvertError, UnsupportedOption
from pocketllava.commands.progress import targets
from pocketllava.convert import convert, requantize
from pocketllava.convert.pipeline import execute_all, plan, plan_types
from pocketllava.convert.write.journal import JOURNAL
from pocketllava.models.bundle import MMPROJ, MODEL
from pocketllava.models.manifest import Types

KILLS = int(os.environ.get("POCKETLLAVA_KILLS", "2"))
SEED = int(os.environ.get("POCKETLLAVA_SEED", "0"))
QUANTS = ("Q4_0", "Q8_0")
DEEP = {"layers": 16, "ffn": 256}
CONVERT = (
    "import sys; from pocketllava.convert import convert;"
    "convert(sys.argv[1], sys.argv[2], quant='Q2_K', threads=1, resume=True)"
)


def same_files(one: Bundle, other: Bundle) -> bool:
    """Whether both files are equal, byte for byte."""
    return all((one.folder / n).read_bytes() == (other.folder / n).read_bytes() for n in (MODEL, MMPROJ))


def test_several_types_in_one_pass(make_checkpoint: Any, make_bundle: Any, tmp_path: Path) -> None:
    read: dict[str, int] = {}
    types = targets(str(tmp_path / "m"), ("Q4_K_M", "q8_0"))
    planned = dict(zip(types, plan_types(make_checkpoint(), list(types.values())), strict=True))
    made = execute_all(
        planned,
        force=False,
        threads=2,
        progress=lambda stage, _done, total, _name: read.update({stage: total}),
    )
    assert [b.folder for b in made] == [tmp_path / "m" / "Q4_K_M", tmp_path / "m" / "Q8_0"]
    for bundle, quant in zip(made, ("Q4_K_M", "Q8_0"), strict=True):
        alone = make_bundle(quant, "F16")
        assert same_files(bundle, alone)
        assert bundle.manifest == alone.manifest
    (one, _) = planned.values()
    assert read["convert"] == one.text.source_bytes + one.mmproj.source_bytes


def test_a_checkpoint_is_opened_once_for_all_its_types(make_checkpoint: Any) -> None:
    plans = plan_types(make_checkpoint(), ["F16", "q4_k_m", "Q8_0"])
    assert [p.quant for p in plans] == ["F16", "Q4_K_M", "Q8_0"]
    first = plans[0]
    for other in plans[1:]:
        assert other.opened is first.opened  # files, config, vocabulary and template
        assert other.mmproj is first.mmproj
        sources = [[t.source for t in p.text.tensors] for p in (first, other)]
        assert all(a is b for a, b in zip(*sources, strict=True))
    alone = plan(make_checkpoint(), quant="Q4_K_M")
    assert (plans[1].text, plans[1].mmproj, plans[1].dropped) == (alone.text, alone.mmproj, alone.dropped)


def test_where_bundles_go() -> None:
    assert targets("m", ("q4_k_m",)) == {Path("m"): "Q4_K_M"}
    assert targets("m-{quant}", ("F16", "Q8_0")) == {Path("m-F16"): "F16", Path("m-Q8_0"): "Q8_0"}
    assert targets("m", ("F16", "Q8_0", "f16")) == {Path("m/F16"): "F16", Path("m/Q8_0"): "Q8_0"}


@pytest.mark.parametrize(("dtype", "kind"), [("F16", "F16"), ("BF16", "BF16"), ("BF16", "F32")])
def test_a_bundle_of_floats_quantizes_to_what_its_checkpoint_gives(
    make_bundle: Any, tmp_path: Path, dtype: str, kind: str
) -> None:
    source = make_bundle(kind, "F32", dtype=dtype)
    made = requantize(source, {tmp_path / q: q for q in QUANTS}, mmproj="Q8_0")
    for bundle, quant in zip(made, QUANTS, strict=True):
        direct = make_bundle(quant, "Q8_0", dtype=dtype)
        assert same_files(bundle, direct)
        origin = bundle.manifest.quantized_from
        assert origin
        assert origin.types == source.manifest.types
        assert origin.sha256 == {name: record.sha256 for name, record in source.manifest.files.items()}
        assert replace(bundle.manifest, quantized_from=None) == direct.manifest


@pytest.mark.parametrize("mmproj", ["F16", "Q8_0"])
def test_the_mmproj_is_copied(make_bundle: Any, tmp_path: Path, mmproj: str) -> None:
    source = make_bundle("F16", mmproj)
    (made,) = requantize(source, {tmp_path / "b": "Q4_0"})
    assert made.mmproj.read_bytes() == source.mmproj.read_bytes()
    assert made.manifest.types == Types("Q4_0", mmproj)


def test_a_quantized_bundle_is_refused_by_name(make_bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedOption, match=r"found Q4_K_M, quantized already .* expected F32, F16 or BF16"
    ):
        requantize(make_bundle("Q4_K_M"), {tmp_path / "b": "Q2_K"})
    with pytest.raises(UnsupportedOption, match=r"mmproj.gguf: found Q8_0, quantized already"):
        requantize(make_bundle("F16", "Q8_0"), {tmp_path / "b": "Q2_K"}, mmproj="F16")
    assert list(tmp_path.iterdir()) == []


def kill_after(checkpoint: Path, out: Path, n_lines: int) -> bool:
    """Start a conversion and kill it once its journal has n_lines; whether it was still at work."""
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(checkpoint), str(out)], stderr=subprocess.DEVNULL
    )
    journal = out.parent / f".{out.name}.partial" / JOURNAL
    while process.poll() is None and lines_of(journal) < n_lines:
        time.sleep(0.001)
    process.kill()
    return process.wait() != 0


def lines_of(journal: Path) -> int:
    """Lines in the journal; 0 where there is none."""
    try:
        return journal.read_bytes().count(b"\n")
    except OSError:
        return 0


def resumed(checkpoint: Path, out: Path, quant: str) -> tuple[Bundle, float]:
    """The bundle, and the share of the source at which the conversion continued."""
    shares: list[float] = []

    def note(_stage: str, done: int, total: int, _name: str) -> None:
        shares.append(done / total)

    bundle = convert(checkpoint, out, quant=quant, resume=True, progress=note)
    return bundle, shares[0] if shares else 1.0


def test_a_killed_conversion_continues(make_checkpoint: Any, tmp_path: Path) -> None:
    """Killed in the text model's tensors, early and late, and in the mmproj's: the same bundle each time."""
    checkpoint, out = make_checkpoint(**DEEP), tmp_path / "bundle"
    complete = convert(checkpoint, tmp_path / "complete", quant="Q2_K")
    planned = plan(checkpoint, quant="Q2_K")
    n_text, n_mmproj = len(planned.text.tensors), len(planned.mmproj.tensors)
    moments = [3, *random.Random(SEED).sample(range(4, n_text), KILLS), n_text + n_mmproj // 2]
    kills, shares = 0, []
    for n_lines in sorted(moments):
        kills += kill_after(checkpoint, out, n_lines)
        assert not out.exists()
        bundle, share = resumed(checkpoint, out, "Q2_K")
        shares.append(share)
        assert same_files(bundle, complete)
        assert bundle.manifest == complete.manifest
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "complete"]
        shutil.rmtree(out)
    assert kills == len(moments)  # each was still at work
    assert min(shares) > 0  # and none began anew
    assert shares == sorted(shares)
    assert shares[-1] >= planned.text.source_bytes / (planned.text.source_bytes + planned.mmproj.source_bytes)


def test_a_conversion_that_is_killed_twice_continues(make_checkpoint: Any, tmp_path: Path) -> None:
    checkpoint, out = make_checkpoint(**DEEP), tmp_path / "bundle"
    journal = tmp_path / ".bundle.partial" / JOURNAL
    assert kill_after(checkpoint, out, 20)
    first = lines_of(journal)
    assert kill_after(checkpoint, out, first + 20)
    assert lines_of(journal) >= first + 20  # the second run added to what the first had done
    bundle, share = resumed(checkpoint, out, "Q2_K")
    assert share > 0
    assert same_files(bundle, convert(checkpoint, tmp_path / "complete", quant="Q2_K"))


def interrupted(checkpoint: Path, out: Path, share: float, **options: Any) -> None:
    """Convert up to about that share, as far as resume=True keeps it."""

    def stop(_stage: str, done: int, total: int, _name: str) -> None:
        if done > share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, out, resume=True, progress=stop, **options)


@pytest.mark.parametrize(
    "damage", ["none", "flipped", "cut", "no journal", "torn journal", "other type", "newer source"]
)
def test_only_what_is_whole_and_meant_is_kept(
    make_checkpoint: Any, make_bundle: Any, tmp_path: Path, damage: str
) -> None:
    checkpoint, work = make_checkpoint(), tmp_path / ".b.partial"
    interrupted(checkpoint, tmp_path / "b", 0.5, quant="Q2_K" if damage == "other type" else "Q4_K_M")
    model, journal = work / MODEL, work / JOURNAL
    size = model.stat().st_size
    if damage == "flipped":
        data = bytearray(model.read_bytes())
        data[-1000] ^= 1
        model.write_bytes(data)
    elif damage == "cut":
        os.truncate(model, size - 1000)
    elif damage == "no journal":
        journal.unlink()
    elif damage == "torn journal":
        journal.write_text(journal.read_text()[:-9])
    elif damage == "newer source":
        os.utime(checkpoint / "model.safetensors")
    bundle, share = resumed(checkpoint, tmp_path / "b", "Q4_K_M")
    assert same_files(bundle, make_bundle("Q4_K_M", "F16"))
    kept = damage in ("none", "flipped", "cut", "torn journal")
    assert (share > 0.2) == kept
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_resuming_what_is_finished_leaves_it(make_checkpoint: Any, tmp_path: Path) -> None:
    made = convert(make_checkpoint(), tmp_path / "b", quant="Q8_0")
    before = made.model.stat().st_mtime_ns
    assert convert(make_checkpoint(), tmp_path / "b", quant="Q8_0", resume=True).manifest == made.manifest
    assert made.model.stat().st_mtime_ns == before
    with pytest.raises(ConvertError, match="holds a bundle already"):
        convert(make_checkpoint(), tmp_path / "b", quant="Q4_0", resume=True)


def test_the_commands(make_checkpoint: Any, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pocketllava.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    floats = run("convert", str(make_checkpoint()), "--out", str(tmp_path / "f16"), "--quant", "F16")
    assert floats.returncode == 0, floats.stderr
    made = run(
        "quantize",
        str(tmp_path / "f16"),
        "--out",
        str(tmp_path / "q-{quant}"),
        "--quant",
        "Q4_0",
        "--quant",
        "Q8_0",
    )
    assert made.returncode == 0, made.stderr
    assert made.stderr.count("\n") == 2
    assert json.loads((tmp_path / "q-Q4_0" / "bundle.json").read_text())["types"]["model"] == "Q4_0"
    refused = run("quantize", str(tmp_path / "q-Q4_0"), "--out", str(tmp_path / "no"), "--quant", "Q2_K")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1

"""Several types from one pass, types from a bundle, and conversions that are killed and go on: the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pocketllava import Bundle, ConvertError, UnsupportedOption
from pocketllava.commands.progress import targets
from pocketllava.convert import convert, requantize
from pocketllava.convert.pipeline import execute_all, plan
from pocketllava.convert.write.journal import JOURNAL
from pocketllava.models.bundle import MMPROJ, MODEL

KILLS = int(os.environ.get("POCKETLLAVA_KILLS", "3"))
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
    planned = {
        t: plan(make_checkpoint(), quant=q)
        for t, q in targets(str(tmp_path / "m"), ("Q4_K_M", "q8_0")).items()
    }
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
        assert bundle.manifest["quantized_from"]["sha256"][MODEL] == source.manifest["files"][MODEL]["sha256"]
        changed = {"quantized_from", "files", "types"}
        rest = [{k: v for k, v in b.manifest.items() if k not in changed} for b in (bundle, source)]
        assert rest[0] == rest[1]
        assert bundle.manifest["types"] == direct.manifest["types"]


@pytest.mark.parametrize("mmproj", ["F16", "Q8_0"])
def test_the_mmproj_is_copied(make_bundle: Any, tmp_path: Path, mmproj: str) -> None:
    source = make_bundle("F16", mmproj)
    (made,) = requantize(source, {tmp_path / "b": "Q4_0"})
    assert made.mmproj.read_bytes() == source.mmproj.read_bytes()
    assert made.manifest["types"] == {"model": "Q4_0", "mmproj": mmproj}


def test_a_quantized_bundle_is_refused_by_name(make_bundle: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedOption, match=r"found Q4_K_M, quantized already .* expected F32, F16 or BF16"
    ):
        requantize(make_bundle("Q4_K_M"), {tmp_path / "b": "Q2_K"})
    with pytest.raises(UnsupportedOption, match=r"mmproj.gguf: found Q8_0, quantized already"):
        requantize(make_bundle("F16", "Q8_0"), {tmp_path / "b": "Q2_K"}, mmproj="F16")
    assert list(tmp_path.iterdir()) == []


def killed(checkpoint: Path, out: Path, rng: random.Random) -> int:
    """Start a conversion and kill it at some moment; returns how it ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(checkpoint), str(out)], stderr=subprocess.DEVNULL
    )
    work = out.parent / f".{out.name}.partial"
    while not (work / JOURNAL).exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(rng.random() * float(os.environ.get("POCKETLLAVA_KILL_WITHIN_S", "1")))
    process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    return process.wait()


def gone_on(checkpoint: Path, out: Path, quant: str) -> tuple[Bundle, float]:
    """The bundle, and where the conversion began, as a share of the source."""
    shares: list[float] = []

    def note(_stage: str, done: int, total: int, _name: str) -> None:
        shares.append(done / total)

    made = convert(checkpoint, out, quant=quant, resume=True, progress=note)
    return made, shares[0] if shares else 1.0


def test_a_killed_conversion_goes_on(make_checkpoint: Any, tmp_path: Path) -> None:
    """POCKETLLAVA_KILLS moments; each time a bundle is there whole or not at all, and the end is the same."""
    checkpoint, rng = make_checkpoint(**DEEP), random.Random(int(os.environ.get("POCKETLLAVA_SEED", "0")))
    whole = convert(checkpoint, tmp_path / "whole", quant="Q2_K")
    went_on: list[float] = []
    ends: list[int] = []
    out = tmp_path / "bundle"
    for _ in range(KILLS):
        ends.append(killed(checkpoint, out, rng))
        assert not out.exists() or same_files(Bundle.open(out), whole)
        if out.exists() or rng.random() < 0.7:  # otherwise killed again, further on
            made, share = gone_on(checkpoint, out, "Q2_K")
            went_on.append(share)
            assert same_files(made, whole)
            assert made.manifest == whole.manifest
            assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "whole"]
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
    print(f"\n{KILLS} kills, exit codes {sorted(set(ends))}; went on at {[f'{x:.0%}' for x in went_on]}")


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
    made, share = gone_on(checkpoint, tmp_path / "b", "Q4_K_M")
    assert same_files(made, make_bundle("Q4_K_M", "F16"))
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


def test_what_changes_on_its_way_to_the_disk_is_found(make_checkpoint: Any, tmp_path: Path) -> None:
    """A byte that is another one when the file is read back: no bundle."""
    work, text = tmp_path / ".b.partial", plan(make_checkpoint()).text

    def spoil(stage: str, done: int, total: int, _name: str) -> None:
        if stage == "convert" and done == text.source_bytes < total:
            with (work / MODEL).open("r+b") as file:
                file.seek(-5000, os.SEEK_END)
                file.write(b"\x55\xaa")

    with pytest.raises(
        ConvertError, match=r"verification failed: .*model.gguf: from byte \d+ on the disk holds"
    ):
        convert(make_checkpoint(), tmp_path / "b", progress=spoil)
    assert list(tmp_path.iterdir()) == []


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

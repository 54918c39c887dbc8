"""Conversions as a user runs them: every layout, the manifest, nothing half-finished, nothing lost."""

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

import numpy as np
import pytest
import small_checkpoint
from gguf import GGMLQuantizationType as T
from gguf import GGUFReader

from pocketllava import Bundle, BundleError, ConvertError, DiskFull, Llava, ModelNotFound, Options
from pocketllava.convert import convert
from pocketllava.convert.pipeline import plan
from pocketllava.convert.read.checkpoint import canonical
from pocketllava.convert.write import produce
from pocketllava.convert.write.journal import has_tensors
from pocketllava.models.gguf_header import Header

LAYOUTS: dict[str, dict[str, Any]] = {
    "old names": {},
    "new names, three shards": {"naming": "new", "shards": 3},
    "newest names, BF16": {"naming": "newest", "dtype": "BF16"},
    "F32, two shards": {"dtype": "F32", "shards": 2},
    "grouped queries": {"kv_heads": 2},
    "tied embeddings": {"tied": True},
    "Mistral": {"kind": "mistral", "kv_heads": 2},
    "tokenizer.json alone": {"tokenizer_model": False},
    "tokenizer.model alone": {"tokenizer_json": False},
    "sparse config.json": {"sparse_config": True},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_layout_converts_and_answers(make_bundle: Any, layout: dict[str, Any]) -> None:
    bundle = make_bundle("Q8_0", "F16", **layout)
    with Llava.load(bundle.folder) as llava:
        answer = llava.ask(np.zeros((30, 40, 3), np.uint8), "What is it?", options=Options(max_tokens=2))
    assert len(answer.token_ids) == 2


def test_one_model_under_three_namings_gives_the_same_files(make_bundle: Any) -> None:
    bundles = [make_bundle("F16", "F16", naming=n) for n in ("old", "new", "newest")]
    for name in ("model.gguf", "mmproj.gguf"):
        tensors = [
            (h.path.read_bytes()[h.data_start :]) for h in (Header.read(b.folder / name) for b in bundles)
        ]
        assert tensors[0] == tensors[1] == tensors[2]


def test_both_tokenizer_files_give_the_same_vocabulary(make_checkpoint: Any) -> None:
    one = plan(make_checkpoint(tokenizer_model=False)).opened.vocab
    other = plan(make_checkpoint(tokenizer_json=False)).opened.vocab
    assert (one.tokens, one.types) == (other.tokens, other.types)
    assert np.allclose(one.scores, other.scores)
    assert len(one.tokens) == small_checkpoint.Layout().vocab
    assert one.tokens[-1] == f"[PAD{len(one.tokens) - 1}]"


def test_ggufs_own_reader_reads_both_files(make_bundle: Any) -> None:
    bundle = make_bundle("Q4_K_M", "Q8_0")
    mmproj = GGUFReader(bundle.mmproj)
    feature_layer = mmproj.fields["clip.vision.feature_layer"]
    assert [int(feature_layer.parts[i][0]) for i in feature_layer.data] == [2]
    types = {t.name: t.tensor_type for t in mmproj.tensors}
    assert types["v.blk.0.attn_q.weight"] == T.Q8_0
    assert types["v.patch_embd.weight"] == T.F16
    assert types["v.position_embd.weight"] == types["v.class_embd"] == types["mm.0.bias"] == T.F32
    assert not any(name.startswith(("v.blk.2.", "v.post_ln")) for name in types)
    model = GGUFReader(bundle.model)
    assert model.fields["tokenizer.chat_template"].contents() == small_checkpoint.CHAT_TEMPLATE


def test_the_manifest_says_what_the_bundle_is(make_checkpoint: Any, make_bundle: Any) -> None:
    bundle = make_bundle("Q4_K_M", "F16")
    manifest = json.loads((bundle.folder / "bundle.json").read_text())
    weights = make_checkpoint() / "model.safetensors"
    assert manifest["types"] == {"model": "Q4_K_M", "mmproj": "F16"}
    assert manifest["source"]["id"] == make_checkpoint().name
    assert manifest["source"]["weights"] == {"model.safetensors": weights.stat().st_size}
    assert manifest["chat_template"] == small_checkpoint.CHAT_TEMPLATE
    assert manifest["image"]["n_patches"] == 576
    bundle.check_hashes()


def test_progress_counts_every_byte_twice(make_checkpoint: Any, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    convert(
        make_checkpoint(),
        tmp_path / "b",
        progress=lambda s, done, all_, _name: seen.setdefault(s, []).append((done, all_)),
    )
    assert list(seen) == ["convert", "verify"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]


def test_canonical_names() -> None:
    assert canonical("language_model.model.layers.0.mlp.up_proj.weight") == "text.layers.0.mlp.up_proj.weight"
    assert canonical("model.language_model.language_model.norm.weight") == "text.norm.weight"
    assert canonical("model.vision_tower.pre_layrnorm.bias") == "vision.pre_layrnorm.bias"
    assert canonical("lm_head.weight") == "text.lm_head.weight"
    assert canonical("optimizer.state") is None


def test_an_existing_bundle_is_kept_unless_forced(make_checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    first = convert(make_checkpoint(), out, quant="Q8_0").manifest
    with pytest.raises(ConvertError, match="holds a bundle already; use --force"):
        convert(make_checkpoint(), out, quant="Q4_0")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(make_checkpoint(), out, quant="Q4_0", force=True, progress=interrupt)
    assert Bundle.open(out).manifest == first
    assert convert(make_checkpoint(), out, quant="Q4_0", force=True).manifest.types.model == "Q4_0"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_targets_that_are_no_place_for_a_bundle(make_checkpoint: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    with pytest.raises(ConvertError, match="a file; --out names the folder to make"):
        convert(make_checkpoint(), tmp_path / "file")
    with pytest.raises(ConvertError, match=r"holds 'thesis.txt'; --out must be a new or empty folder"):
        convert(make_checkpoint(), tmp_path / "folder", force=True)
    with pytest.raises(ConvertError, match="cannot be written"):
        convert(make_checkpoint(), tmp_path / "file" / "below")
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert(make_checkpoint(), tmp_path / "empty")


def test_an_unwritable_folder(make_checkpoint: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    nowhere = Path("/proc/self") if sys.platform == "linux" else tmp_path  # root may write to any real folder
    with pytest.raises(ConvertError, match="cannot be written"):
        convert(make_checkpoint(), nowhere / "bundle")


def test_too_little_disk_is_said_before_the_work(
    make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(produce, "DISK_MARGIN_BYTES", 1 << 60)
    with pytest.raises(DiskFull, match=r"GB free, .* GB needed") as caught:
        convert(make_checkpoint(), tmp_path / "bundle", progress=lambda *_: pytest.fail("work had begun"))
    assert caught.value.needed_bytes > caught.value.available_bytes
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_to_one_place(make_checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"

    def again(*_: Any) -> None:
        with pytest.raises(ConvertError, match="another conversion is writing there"):
            convert(make_checkpoint(), out)

    convert(make_checkpoint(), out, progress=again)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_kill_between_the_last_two_renames_loses_nothing(make_checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    old = convert(make_checkpoint(), out, quant="Q8_0").manifest
    out.rename(tmp_path / ".bundle.old")
    with pytest.raises(ConvertError, match="already"):
        convert(make_checkpoint(), out, force=False)
    assert Bundle.open(out).manifest == old


KILLED = "import sys; from pocketllava.convert import convert; convert(sys.argv[1], sys.argv[2], quant='Q2_K', threads=1)"


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGINT", "SIGTERM"] if os.name == "posix" else ["SIGTERM"])
def test_a_killed_conversion_leaves_nothing_under_the_final_name(
    make_checkpoint: Any, tmp_path: Path, kind: str
) -> None:
    checkpoint, out = make_checkpoint(layers=16, ffn=256), tmp_path / "bundle"
    work = tmp_path / ".bundle.partial"
    rng = random.Random(0)
    for _ in range(2):  # at random moments; `make attack` interrupts many more
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(checkpoint), str(out)], stderr=subprocess.DEVNULL
        )
        while not (work / "model.gguf").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.4)
        process.send_signal(getattr(signal, kind))
        process.wait()
        assert not out.exists() or Bundle.open(out)
        if kind == "SIGINT":
            assert not work.exists() or has_tensors(work)  # for --resume
    assert convert(checkpoint, out, quant="Q2_K", force=True).manifest.types.model == "Q2_K"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_damaged_bundle_is_not_opened(make_bundle: Any, tmp_path: Path) -> None:
    source = make_bundle("Q8_0")

    def copy(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in source.folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    cut = copy("cut")
    (cut / "model.gguf").write_bytes((cut / "model.gguf").read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model.gguf: found \d+ bytes, expected \d+"):
        Bundle.open(cut)
    gone = copy("gone")
    (gone / "mmproj.gguf").unlink()
    with pytest.raises(BundleError, match=r"mmproj.gguf: missing"):
        Llava.load(gone)
    flipped = copy("flipped")
    data = bytearray((flipped / "model.gguf").read_bytes())
    data[-100] ^= 1
    (flipped / "model.gguf").write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256 is"):
        Bundle.open(flipped).check_hashes()
    garbled = copy("garbled")
    (garbled / "bundle.json").write_text("{}")
    with pytest.raises(BundleError, match=r"bundle\.json: format is missing, expected 1; convert again"):
        Bundle.open(garbled)


def test_a_foreign_mmproj_is_refused_with_both_widths(make_bundle: Any, tmp_path: Path) -> None:
    source, other = make_bundle("Q8_0"), make_bundle(hidden=512, heads=8, kv_heads=8, layers=1, ffn=256)
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in source.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "mmproj.gguf").write_bytes(other.mmproj.read_bytes())
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["files"]["mmproj.gguf"]["bytes"] = other.mmproj.stat().st_size
    (folder / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="projects to width 512, the text model has 256"):
        Llava.load(folder)


def test_places_without_a_bundle(make_checkpoint: Any, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFound, match=r"found nothing, expected a folder made by .*, did you mean 'bundle'\?"
    ):
        Llava.load(bundle.folder.parent / "bundel")
    with pytest.raises(ModelNotFound, match="it is a checkpoint: run `pocketllava convert"):
        Llava.load(make_checkpoint())
    with Llava.load(bundle.model) as llava:  # a text model as it lies, which here is a bundle's
        assert llava.bundle.folder == bundle.folder
    with pytest.raises(ModelNotFound, match=r"no bundle\.json"):
        Llava.load(tmp_path)

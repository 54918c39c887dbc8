"""GGUF files as people have them: asked where they lie, by the rules of who belongs to whom, mended in a sidecar."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import MakeBundle
from gguf import GGUFValueType as V
from gguf import GGUFWriter
from test_repair import DEPTH, PROJECTOR, hub_file, rewritten

from pocketllava import (
    Bundle,
    BundleError,
    InputError,
    Llava,
    ModelNotFound,
    PocketLlavaError,
    UnsupportedOption,
)
from pocketllava.cli import cli
from pocketllava.convert.pair import TEMPLATES
from pocketllava.measure.feature_drift import features_move
from pocketllava.models.bundle import MANIFEST, MMPROJ, MODEL
from pocketllava.names import open_bundle
from pocketllava.types import TEMPLATES as NAMED

PHOTO = str(Path(__file__).parent / "photo.jpg")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    folder = tmp_path / "cache"
    for module in ("foreign", "llamafile"):
        monkeypatch.setattr(f"pocketllava.convert.{module}.cache_folder", lambda: folder)
    return folder


@pytest.fixture
def lying(bundle: Bundle, tmp_path: Path) -> Path:
    """A folder with a text model and its mmproj, named as repositories name them."""
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(bundle.model, folder / "llava-v1.5-7b-Q4_K.gguf")
    shutil.copy(bundle.mmproj, folder / "llava-v1.5-7b-mmproj-f16.gguf")
    return folder


def named(folder: Path, architecture: str, **keys: str) -> Path:
    """A small GGUF file of another kind."""
    path = folder / f"{architecture}-model.gguf"
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        writer.add_string(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_mmproj_beside_a_model_is_found_and_the_model_is_not_copied(
    lying: Path, llava: Llava, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = lying / "llava-v1.5-7b-Q4_K.gguf"
    own = llava.bundle.manifest
    with Llava.load(model, template="llava-hf", pad=own.preprocessing.pad_to_square) as foreign:
        assert foreign.bundle.model == model
        assert foreign.bundle.mmproj == lying / "llava-v1.5-7b-mmproj-f16.gguf"
        for question in ("What is it?", "How many?"):
            ours = foreign.ask(PHOTO, question, max_tokens=12)
            assert ours.token_ids == llava.ask(PHOTO, question, max_tokens=12).token_ids
    assert [r.getMessage().split("; ")[0] for r in caplog.records if r.levelno == logging.WARNING] == [
        "llava-v1.5-7b-Q4_K.gguf: a LLaVA-1.5 with llava-v1.5-7b-mmproj-f16.gguf"
    ]
    caplog.clear()
    Llava.load(model, template="llava-hf", pad=own.preprocessing.pad_to_square).close()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]  # said once
    assert sum(path.stat().st_size for path in cache.rglob("*")) < 1 << 17
    assert sorted(path.name for path in lying.iterdir()) == [
        "llava-v1.5-7b-Q4_K.gguf",
        "llava-v1.5-7b-mmproj-f16.gguf",
    ]


def test_a_child_process_takes_a_pair(lying: Path, llava: Llava) -> None:
    with Llava.load(lying, mmproj=lying / "llava-v1.5-7b-mmproj-f16.gguf", isolated=True) as foreign:
        assert foreign.ask(PHOTO, "What is it?", max_tokens=3).text


def test_a_folder_and_a_pair_in_two_folders(lying: Path, tmp_path: Path) -> None:
    assert open_bundle(lying).model == lying / "llava-v1.5-7b-Q4_K.gguf"
    apart = tmp_path / "apart"
    apart.mkdir()
    mmproj = (lying / "llava-v1.5-7b-mmproj-f16.gguf").rename(apart / "vision.gguf")
    with pytest.raises(BundleError, match=r"a text model alone, found no mmproj beside it; .* --mmproj FILE"):
        open_bundle(lying)
    assert open_bundle(lying, mmproj=mmproj).mmproj == mmproj
    above = mmproj.rename(tmp_path / "mmproj-model-f16.gguf")
    assert open_bundle(lying).mmproj == above
    (lying / "other.gguf").write_bytes((lying / "llava-v1.5-7b-Q4_K.gguf").read_bytes())
    with pytest.raises(InputError, match=r"found 2 text models .*; name one of the files"):
        open_bundle(lying)


def test_of_several_projectors_the_nearest_name_and_type_is_taken(
    lying: Path, make_bundle: MakeBundle, caplog: pytest.LogCaptureFixture
) -> None:
    model = lying / "llava-v1.5-7b-Q4_K.gguf"
    shutil.copy(make_bundle("F16", "Q8_0").mmproj, lying / "llava-v1.5-7b-mmproj-Q8_0.gguf")
    shutil.copy(make_bundle(hidden=512).mmproj, lying / "llava-v1.5-7b-mmproj-13b.gguf")
    tiled = shutil.copy(make_bundle(tiled=True).mmproj, lying / "llava-v1.6-mmproj-f16.gguf")
    assert open_bundle(model).mmproj.name == "llava-v1.5-7b-mmproj-f16.gguf"
    assert "(F16, rather than llava-v1.5-7b-mmproj-Q8_0.gguf" in caplog.text
    (lying / "llava-v1.5-7b-mmproj-f16.gguf").unlink()
    assert open_bundle(model).mmproj.name == "llava-v1.5-7b-mmproj-Q8_0.gguf"
    plain = model.rename(lying / "model.gguf")
    with pytest.raises(InputError, match=r"projectors of LLaVA-1\.5 and of 1\.6 beside it"):
        open_bundle(plain)
    assert open_bundle(plain, mmproj=tiled).preprocessing.tiling is not None
    with pytest.raises(BundleError, match=r"projects to width 512, model\.gguf has 256"):
        open_bundle(plain, mmproj=lying / "llava-v1.5-7b-mmproj-13b.gguf")


@pytest.mark.parametrize("tiled", [False, True])
def test_a_projector_with_faults_is_mended_in_a_sidecar(
    make_bundle: MakeBundle, lying: Path, cache: Path, tiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    right = make_bundle(tiled=tiled).mmproj
    (lying / "llava-v1.5-7b-mmproj-f16.gguf").unlink()
    rename = {"v.image_newline": "model.image_newline"} if tiled else {}
    wrong = hub_file(right, lying / "mmproj-model-f16.gguf", rename=rename)
    before = wrong.read_bytes()
    opened = open_bundle(lying)
    assert opened.mmproj.parent == cache / "projectors"
    assert features_move(opened.mmproj, right) == 0.0
    assert wrong.read_bytes() == before
    assert "mended in a copy: " in caplog.text
    assert f"{PROJECTOR} is missing" in caplog.text
    assert open_bundle(lying, pad=None if tiled else False).mmproj == opened.mmproj
    assert len(list((cache / "projectors").glob("*.gguf"))) == 1
    opened.mmproj.unlink()  # someone cleans the cache
    assert features_move(open_bundle(lying).mmproj, right) == 0.0


def test_first_uses_at_once_make_one_sidecar(bundle: Bundle, lying: Path, cache: Path) -> None:
    (lying / "llava-v1.5-7b-mmproj-f16.gguf").unlink()
    hub_file(bundle.mmproj, lying / "mmproj-model-f16.gguf")
    opened: list[Bundle] = []
    threads = [threading.Thread(target=lambda: opened.append(open_bundle(lying))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 6
    assert len({each.mmproj for each in opened}) == 1
    assert len(list(cache.rglob(MANIFEST))) == 1


def test_a_bundles_own_text_model_is_the_bundle(bundle: Bundle) -> None:
    assert open_bundle(bundle.model) == Bundle.open(bundle.folder)
    assert open_bundle(bundle.model, template="mistral").template == TEMPLATES["mistral"]
    for options in ({"mmproj": bundle.mmproj}, {"template": "mistral"}, {"pad": True}):
        with pytest.raises(UnsupportedOption, match=r"is a bundle, whose bundle\.json says it"):
            open_bundle(bundle.folder, **options)


@pytest.mark.parametrize(
    ("changes", "expected", "pads"),
    [
        ({}, "llava-hf", False),
        ({"naming": "original"}, "vicuna_v1", True),
        ({"llama3": True, "naming": "original"}, "llama-3", True),
        ({"chatml": True, "naming": "original", "tiled": True, "aspect": "anyres"}, "chatml", False),
        (
            {"naming": "original", "tiled": True, "aspect": "anyres", "kv_heads": 2, "kind": "mistral"},
            "mistral",
            False,
        ),
    ],
    ids=["llava-hf", "vicuna", "llama-3", "chatml", "mistral"],
)
def test_what_is_assumed_follows_from_the_headers(
    make_bundle: MakeBundle, tmp_path: Path, changes: dict[str, Any], expected: str, pads: bool
) -> None:
    made = make_bundle(**changes)
    model, mmproj = tmp_path / "model.gguf", tmp_path / "mmproj.gguf"
    rewritten_model(made.model, model, keep=expected == "llava-hf")
    shutil.copy(made.mmproj, mmproj)
    opened = open_bundle(model)
    if expected != "llava-hf":
        assert opened.template == TEMPLATES[expected]
        assert opened.template == made.template
    assert opened.preprocessing.pad_to_square == pads
    assert opened.manifest.eos_token_ids[0] in made.manifest.eos_token_ids


def rewritten_model(source: Path, out: Path, *, keep: bool) -> None:
    """A text model without its template, as llama.cpp's first scripts left it out."""
    if keep:
        shutil.copy(source, out)
        return
    from gguf import GGUFReader

    reader, writer = GGUFReader(source), GGUFWriter(out, "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "tokenizer.chat_template")):
            item = field.types[-1] if field.types[0] is V.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_template_can_be_said(lying: Path) -> None:
    assert tuple(TEMPLATES) == NAMED
    for name, template in TEMPLATES.items():
        assert open_bundle(lying, template=name).template == template
    with pytest.raises(
        UnsupportedOption, match="template: found 'alpaca', expected None or one of 'vicuna_v1'"
    ):
        Llava.load(lying, template="alpaca")


def test_what_is_no_llava_is_refused_by_what_it_is(lying: Path, tmp_path: Path) -> None:
    model, mmproj = lying / "llava-v1.5-7b-Q4_K.gguf", lying / "llava-v1.5-7b-mmproj-f16.gguf"
    other = tmp_path / "other"
    other.mkdir()
    qwen = named(other, "qwen2vl")
    eyes = named(other, "clip", clip__projector_type="qwen2vl_merger")
    wrong = rewritten(
        mmproj, other / "resampler.gguf", drop=(PROJECTOR,), rename={"mm.2.weight": "mm.3.weight"}
    )
    (other / "no.gguf").write_text("GGUF, but not really")
    for arguments, message in (
        ((mmproj, None), "an mmproj alone, the vision part of a model; give its text model"),
        ((qwen, None), r"a text model of architecture 'qwen2vl' \(Qwen2-VL\), expected 'llama'"),
        ((named(other, "bert"), None), "found a GGUF file of architecture 'bert', expected 'llama'"),
        ((model, eyes), r"the projector of Qwen2-VL \('qwen2vl_merger'\), expected a LLaVA's, 'mlp'"),
        ((model, model), "a GGUF file of architecture 'llama', expected 'clip'"),
        ((model, wrong), "belongs to another kind of model"),
        ((model, other / "missing.gguf"), "cannot be read"),
        ((other / "no.gguf", None), "not a whole GGUF file"),
        ((Path(__file__), None), "not a whole GGUF file"),
    ):
        with pytest.raises(BundleError, match=message) as caught:
            open_bundle(arguments[0], mmproj=arguments[1])
        assert "\n" not in str(caught.value)
    with pytest.raises(
        ModelNotFound, match=r"found .*'qwen2vl'.*, expected a LLaVA's text model and its mmproj"
    ):
        open_bundle(other)


def test_a_damaged_file_is_one_line_and_leaves_nothing(lying: Path, cache: Path) -> None:
    mmproj = lying / "llava-v1.5-7b-mmproj-f16.gguf"
    whole = rewritten(mmproj, lying / "x.gguf", drop=(DEPTH, PROJECTOR)).read_bytes()
    (lying / "x.gguf").unlink()
    for cut in (0, 5, 100, 900, len(whole) - 40):
        mmproj.write_bytes(whole[:cut])
        with pytest.raises(PocketLlavaError) as caught:
            open_bundle(lying)
        assert "\n" not in str(caught.value)
    assert not [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_referenced_file_that_changes_is_named(lying: Path, bundle: Bundle) -> None:
    opened = open_bundle(lying)
    assert opened.manifest.files[MODEL].sha256 is None
    opened.check_hashes()
    Bundle.open(opened.folder)
    with opened.mmproj.open("r+b") as file:
        file.seek(40)
        file.write(b"x")
    with pytest.raises(
        BundleError, match=r"mmproj-f16\.gguf: .*put it back, or `pocketllava import` it again"
    ):
        Bundle.open(opened.folder)
    opened.model.unlink()
    with pytest.raises(BundleError, match=r"Q4_K\.gguf: missing, though bundle\.json names it; put it back"):
        Bundle.open(opened.folder)


def test_the_commands_take_a_pair(lying: Path) -> None:
    model, mmproj = str(lying / "llava-v1.5-7b-Q4_K.gguf"), str(lying / "llava-v1.5-7b-mmproj-f16.gguf")
    pair = ["--mmproj", mmproj, "--template", "vicuna_v1", "--crop"]
    run = CliRunner()
    done = run.invoke(cli, ["ask", model, PHOTO, "What?", "--max-tokens", "3", *pair])
    assert done.exit_code == 0, done.output
    assert run.invoke(cli, ["inspect", model, *pair]).exit_code == 0
    followed = run.invoke(cli, ["inspect", model, "--image", PHOTO, *pair])
    assert followed.exit_code == 0, followed.output
    talked = run.invoke(cli, ["chat", model, *pair], input="Hello\n")
    assert talked.exit_code == 0, talked.output
    assert Bundle.open(open_bundle(model).folder).path_of(MMPROJ) == Path(mmproj)

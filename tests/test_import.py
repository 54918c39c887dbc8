"""What other programs keep: a fake home for each program and system, listed, and taken into the store by reference."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import MakeBundle
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from test_repair import PROJECTOR, hub_file

from pocketllava import Bundle, BundleError, InputError, Llava, ModelNotFound
from pocketllava.cli import cli
from pocketllava.convert.adopt import adopt, default_name, found, scan
from pocketllava.convert.pair import style
from pocketllava.measure.feature_drift import features_move
from pocketllava.models.bundle import MMPROJ, MODEL
from pocketllava.models.catalog import Root, groups, ollama_layers, ollama_model, roots, walk
from pocketllava.models.store import VARIABLE, Store

PHOTO = str(Path(__file__).parent / "photo.jpg")
REPO = "second-state/Llava-v1.5-7B-GGUF"
MODEL_NAME, MMPROJ_NAME = "llava-v1.5-7b-Q4_K_M.gguf", "llava-v1.5-7b-mmproj-model-f16.gguf"
SYSTEMS = ("linux", "darwin", "win32")
Fill = Callable[[Path, Bundle], None]


def put(folder: Path, made: Bundle, prefix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(made.model, folder / f"{prefix}{MODEL_NAME}")
    shutil.copy(made.mmproj, folder / f"{prefix}{MMPROJ_NAME}")


def blob(folder: Path, content: bytes) -> dict[str, Any]:
    """A blob under its SHA-256, and its layer."""
    digest = hashlib.sha256(content).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"sha256-{digest}").write_bytes(content)
    return {"digest": f"sha256:{digest}", "size": len(content)}


def ollama(root: Path, made: Bundle, name: str = "llava/7b", mmproj: Path | None = None) -> None:
    """Ollama's folder with one model."""
    parts = {
        "model": made.model.read_bytes(),
        "projector": (mmproj or made.mmproj).read_bytes(),
        "template": b"{{ .System }}\nUSER: {{ .Prompt }}\nASSISTANT: ",
    }
    layers = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", **blob(root / "blobs", content)}
        for kind, content in parts.items()
    ]
    path = root / "manifests" / "registry.ollama.ai" / "library" / name
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schemaVersion": 2, "layers": layers}), "utf-8")


def hub_cache(root: Path, made: Bundle) -> None:
    """The hub's cache with one repository: blobs by their SHA-256, and links to them where there are links."""
    place = root / f"models--{REPO.replace('/', '--')}"
    snapshot = place / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for source, name in ((made.model, MODEL_NAME), (made.mmproj, MMPROJ_NAME)):
        if os.name == "nt":
            shutil.copy(source, snapshot / name)
            continue
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        (place / "blobs").mkdir(exist_ok=True)
        shutil.copy(source, place / "blobs" / digest)
        (snapshot / name).symlink_to(Path("../../blobs") / digest)


def in_folder(*parts: str, prefix: str = "") -> Fill:
    return lambda home, made: put(home.joinpath(*parts), made, prefix)


LIBRARY = ("Library", "Application Support")
FLAT = "second-state_Llava-v1.5-7B-GGUF_"
PLACES: dict[tuple[str, str], Fill] = {
    **{(s, "Ollama"): lambda home, made: ollama(home / ".ollama" / "models", made) for s in SYSTEMS},
    **{(s, "LM Studio"): in_folder(".lmstudio", "models", *REPO.split("/")) for s in SYSTEMS},
    **{
        (s, "Hugging Face"): lambda home, made: hub_cache(home / ".cache/huggingface/hub", made)
        for s in SYSTEMS
    },
    ("linux", "llama.cpp"): in_folder(".cache", "llama.cpp", prefix=FLAT),
    ("darwin", "llama.cpp"): in_folder("Library", "Caches", "llama.cpp", prefix=FLAT),
    ("win32", "llama.cpp"): in_folder("AppData", "Local", "llama.cpp", prefix=FLAT),
    ("linux", "Jan"): in_folder(".local", "share", "Jan", "data", "models", "llava"),
    ("darwin", "Jan"): in_folder(*LIBRARY, "Jan", "data", "models", "llava"),
    ("win32", "Jan"): in_folder("AppData", "Roaming", "Jan", "data", "models", "llava"),
    ("linux", "GPT4All"): in_folder(".local", "share", "nomic.ai", "GPT4All"),
    ("darwin", "GPT4All"): in_folder(*LIBRARY, "nomic.ai", "GPT4All"),
    ("win32", "GPT4All"): in_folder("AppData", "Local", "nomic.ai", "GPT4All"),
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """This user's store, empty."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    return Store(tmp_path / "store")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any program's folder, and no variable that names another."""
    folder = tmp_path / "home"
    folder.mkdir()
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(folder))
    for variable in (
        "OLLAMA_MODELS", "LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME",
        "XDG_DATA_HOME", "APPDATA", "LOCALAPPDATA",
    ):  # fmt: skip
        monkeypatch.delenv(variable, raising=False)
    return folder


def run(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(cli, ["import", *arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def mine(home: Path, platform: str = sys.platform) -> list[Root]:
    return [root for root in roots(platform, {}, home) if home in root.folder.parents]


@pytest.mark.parametrize(("platform", "app"), PLACES)
def test_what_a_program_keeps_is_found_and_asked_where_it_lies(
    platform: str, app: str, home: Path, bundle: Bundle, llava: Llava, store: Store
) -> None:
    PLACES[platform, app](home, bundle)
    where = mine(home, platform)
    (row,) = scan(where)
    assert (row.app, row.kind, row.types, row.faults, row.problem) == (
        app,
        "LLaVA-1.5",
        "F16 + F16",
        (),
        None,
    )
    assert found(row.name, None, where).text.path == Path(
        row.model
    )  # the name that is listed can be imported
    assert row.bytes == sum(path.stat().st_size for path in (bundle.model, bundle.mmproj))
    pair = found(row.name, None, where)
    assert pair.text.path == Path(row.model)
    assert pair.owner == app
    how = style(pair.text, pair.projector.info, "llava-hf", False)
    made = adopt(pair, how, "theirs:f16", store=store)
    assert [path.name for path in made.folder.iterdir()] == ["bundle.json"]
    hashed = app in ("Ollama", "Hugging Face") and os.name != "nt"
    expected = hashlib.sha256(bundle.model.read_bytes()).hexdigest() if hashed else None
    assert made.manifest.files[MODEL].sha256 == expected
    if (platform, app) in (("linux", "Ollama"), ("darwin", "LM Studio"), ("win32", "Jan")):
        with Llava.load(made.folder) as theirs:
            answers = [m.ask(PHOTO, "What is it?", max_tokens=8).token_ids for m in (theirs, llava)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("variable", "app", "fill"),
    [
        ("OLLAMA_MODELS", "Ollama", ollama),
        ("LLAMA_CACHE", "llama.cpp", put),
        ("HF_HUB_CACHE", "Hugging Face", hub_cache),
        ("HUGGINGFACE_HUB_CACHE", "Hugging Face", hub_cache),
        ("HF_HOME", "Hugging Face", lambda place, made: hub_cache(place / "hub", made)),
        (
            "XDG_CACHE_HOME",
            "Hugging Face",
            lambda place, made: hub_cache(place / "huggingface" / "hub", made),
        ),
    ],
)
def test_variables_name_other_folders(variable: str, app: str, fill: Any, home: Path, bundle: Bundle) -> None:
    fill(home / "elsewhere", bundle)
    where = roots("linux", {variable: str(home / "elsewhere")}, home)
    assert [group.app for group in groups(where)] == [app]
    assert not list(groups(mine(home, "linux")))


def test_scan_says_what_is_wrong_and_what_is_not_needed_twice(
    home: Path, bundle: Bundle, make_bundle: MakeBundle, tmp_path: Path, store: Store
) -> None:
    wrong = hub_file(bundle.mmproj, tmp_path / "wrong.gguf")
    ollama(home / ".ollama" / "models", bundle, mmproj=wrong)
    put(home / ".lmstudio" / "models" / "cjpais" / "llava-1.6", make_bundle(tiled=True))
    other = home / ".lmstudio" / "models" / "someone" / "Qwen2-VL"
    other.mkdir(parents=True)
    for name, architecture in (("model.gguf", "qwen2vl"), ("mmproj.gguf", "clip")):
        writer = GGUFWriter(other / name, architecture)
        writer.add_string("clip.projector_type", "qwen2vl_merger")
        for write in (
            writer.write_header_to_file,
            writer.write_kv_data_to_file,
            writer.write_tensors_to_file,
        ):
            write()
        writer.close()
    rows = {row["name"]: row for row in json.loads(run("--scan", "--json").stdout)}
    assert rows["cjpais/llava-1.6"]["kind"] == "LLaVA-1.6"
    assert rows["someone/Qwen2-VL"]["kind"] == "Qwen2-VL"
    assert "architecture 'qwen2vl'" in rows["someone/Qwen2-VL"]["problem"]
    assert PROJECTOR in " ".join(rows["ollama:llava:7b"]["faults"])
    assert rows["ollama:llava:7b"]["bytes"] == bundle.model.stat().st_size
    done = run("--scan")
    assert "2 of 3 can be imported" in done.stderr
    assert store.names() == []
    assert len(done.stdout.splitlines()) == 3


def test_ollamas_model_is_taken_by_reference_and_its_projector_mended(
    home: Path, bundle: Bundle, store: Store, tmp_path: Path
) -> None:
    wrong = hub_file(bundle.mmproj, tmp_path / "wrong.gguf")
    ollama(home / ".ollama" / "models", bundle, mmproj=wrong)
    dry = run("ollama:llava:7b", "--as", "mine", "--dry-run")
    assert store.names() == []
    assert "ollama:llava:7b: a LLaVA-1.5 with its projector; mended in a copy" in dry.stderr
    assert run("ollama:llava:7b", "--as", "mine", "--template", "vicuna_v1").stdout == "mine\n"
    made = Bundle.open(store.folder("mine"))
    assert features_move(made.mmproj, bundle.mmproj) == 0.0
    assert made.mmproj.parent == made.folder
    assert made.manifest.references[MODEL].owner == "Ollama"
    verified = CliRunner().invoke(cli, ["verify", "mine"])
    assert verified.stdout == "mine: as recorded\n"
    assert "mine" in CliRunner().invoke(cli, ["list"]).stdout
    made.model.unlink()  # ollama rm
    with pytest.raises(
        BundleError, match=r"missing, .*; Ollama owns it and may have removed or replaced it: put it"
    ):
        Llava.load("mine")
    assert CliRunner().invoke(cli, ["rm", "mine", "--yes"]).exit_code == 0
    assert store.names() == []


def test_copies_and_links_do_not_need_the_program_any_more(home: Path, bundle: Bundle, store: Store) -> None:
    root = home / ".ollama" / "models"
    ollama(root, bundle)
    for how in ("--copy", "--link"):
        run("ollama:llava:7b", "--as", f"mine{how}", how)
    link = Bundle.open(store.folder("mine--link"))
    assert link.model.stat().st_nlink == 2
    shutil.rmtree(root)
    for name in ("mine--copy", "mine--link"):
        opened = Bundle.open(store.folder(name))
        opened.check_hashes()
        assert opened.manifest.references == {}
        assert opened.model.read_bytes() == bundle.model.read_bytes()


def test_a_damaged_blob_is_not_copied(home: Path, bundle: Bundle, store: Store) -> None:
    ollama(home / ".ollama" / "models", bundle)
    place = next(groups(mine(home))).models[0]
    data = bytearray(place.read_bytes())
    data[-100] ^= 1
    place.write_bytes(data)
    with pytest.raises(BundleError, match=r"SHA-256 is .*, its name; it is damaged"):
        CliRunner().invoke(cli, ["import", "ollama:llava:7b", "--copy"], catch_exceptions=False)
    assert store.names() == []


def test_a_file_or_a_folder_is_imported_under_its_own_name(bundle: Bundle, home: Path, store: Store) -> None:
    put(home / "files", bundle)
    assert run(str(home / "files")).stdout == "llava-v1.5-7b:f16\n"
    assert run(str(home / "files" / MODEL_NAME), "--as", "other").stdout == "other\n"
    about = json.loads(run(str(home / "files"), "--as", "third", "--json", "--crop").stdout)
    assert (about["name"], about["pad"], about["owner"], about["imported"]) == ("third", False, None, True)
    again = CliRunner().invoke(cli, ["import", str(home / "files")])
    assert isinstance(again.exception, InputError)
    with pytest.raises(InputError, match="a bundle already"):
        found(str(bundle.folder), None, [])


def test_wrong_usage(home: Path, store: Store) -> None:
    assert "neither PATH nor --scan" in run(code=2).stderr
    run("x", "--scan", code=2)
    with pytest.raises(
        ModelNotFound, match="found nothing, expected a GGUF text model, its folder, or ollama:NAME"
    ):
        found("nothing", None, mine(home))


def test_names_of_ollamas_stay_in_its_folder(home: Path, bundle: Bundle) -> None:
    ollama(home / ".ollama" / "models", bundle, "llava/latest")
    where = mine(home)
    assert ollama_model("llava", where).name == "ollama:llava"
    assert default_name(found("ollama:llava", None, where)) == "llava:f16"
    for name in (
        "../llava",
        "library/../../x",
        "llava:../x",
        "a/b/c/d",
        "",
        ":",
        "llava:7b\0",
        "/etc/passwd",
        "..:..",
    ):
        with pytest.raises(ModelNotFound):
            ollama_model(name, where)
    with pytest.raises(ModelNotFound, match="there are ollama:llava:latest"):
        ollama_model("llama", where)


LAYER = st.fixed_dictionaries(
    {},
    optional={
        "mediaType": st.sampled_from(["application/vnd.ollama.image.model", "x"]) | st.integers() | st.text(),
        "digest": st.sampled_from(
            ["sha256:" + "a" * 64, "sha256:../../etc/passwd", "sha256:" + "A" * 64, "md5:1", "/"]
        )
        | st.none()
        | st.text()
        | st.lists(st.integers()),
        "size": st.integers() | st.text(),
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
)


@given(document=JSON | st.fixed_dictionaries({"layers": st.lists(LAYER | JSON) | JSON}))
def test_hostile_manifests_name_no_other_path(document: Any) -> None:
    try:
        layers = ollama_layers(document, Path("manifest"))
    except BundleError as error:
        assert "\n" not in str(error)
        return
    for digest in (digest for digests in layers.values() for digest in digests):
        assert len(digest) == 64
        assert set(digest) <= set("0123456789abcdef")


@given(data=st.binary(max_size=200) | st.text(alphabet='{}[]",:0layersdigt').map(str.encode))
def test_damaged_manifests_are_passed_over(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "damaged-manifest"
    path = root / "manifests" / "registry.ollama.ai" / "library" / "llava" / "latest"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    where = [Root("Ollama", root, "ollama")]
    assert list(groups(where)) == []
    with pytest.raises(BundleError):
        ollama_model("llava", where)


@pytest.mark.skipif(os.name != "posix", reason="pipes and links")
def test_the_walk_takes_regular_files_only_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "a" / "b" / "c" / "d" / "e" / "f" / "g" / "h"
    deep.mkdir(parents=True)
    for folder in (tmp_path, deep, deep.parent.parent):
        (folder / "x.gguf").write_bytes(b"GGUF")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "nothing")
    assert [path.relative_to(tmp_path).as_posix() for path in walk(tmp_path)] == [
        "x.gguf",
        "a/b/c/d/e/f/x.gguf",
    ]
    monkeypatch.setattr("pocketllava.models.catalog.MAX_ENTRIES", 3)
    assert len(list(walk(tmp_path))) <= 3


def test_the_prompt_that_ollama_gives_is_taken(home: Path, bundle: Bundle, make_bundle: MakeBundle) -> None:
    ollama(home / ".ollama" / "models", bundle)
    for mark, expected in (("[INST] {{ .Prompt }} [/INST]", "mistral"), ("{{ .Prompt }}", None)):
        path = next((home / ".ollama").rglob("7b"))
        document = json.loads(path.read_text("utf-8"))
        layer = blob(home / ".ollama" / "models" / "blobs", mark.encode())
        document["layers"][2] = {"mediaType": "application/vnd.ollama.image.template", **layer}
        path.write_text(json.dumps(document), "utf-8")
        pair = found("ollama:llava:7b", None, mine(home))
        assert pair.template == expected
        assert (
            style(pair.text, pair.projector.info, likely=pair.template).name == "its own"
        )  # a file's own comes first


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8")
def test_a_path_that_is_no_utf8_can_be_referred_to(home: Path, bundle: Bundle, store: Store) -> None:
    folder = home / os.fsdecode(b"mod\xe8les")
    put(folder, bundle)
    run(str(folder), "--as", "mine")
    assert Bundle.open(store.folder("mine")).model == folder / MODEL_NAME


@pytest.mark.parametrize(
    "references",
    [
        {},
        [],
        {"other.gguf": {"path": "/x", "owner": None}},
        *({MODEL: {"path": p, "owner": None}} for p in ("x", "../x", "", 5, "/x\0")),
        *({MODEL: {"path": "/x", "owner": None, "start": n}} for n in (-32, 33, "64", True, 1 << 80)),
        {MMPROJ: {"path": "/x", "owner": None, "start": 64}},
    ],
    ids=str,
)
def test_references_are_absolute_paths_of_a_bundles_files(
    bundle: Bundle, tmp_path: Path, references: Any
) -> None:
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    values = json.loads((folder / "bundle.json").read_text("utf-8"))
    (folder / "bundle.json").write_text(json.dumps({**values, "references": references}), "utf-8")
    with pytest.raises(BundleError, match=r"bundle\.json: (references|.*start).* is .*, expected "):
        Bundle.open(folder)

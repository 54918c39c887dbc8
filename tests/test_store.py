"""The store: names that cannot leave it, entries that appear whole, leases that keep them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketllava import Bundle, InputError, Llava, ModelNotFound, StateError
from pocketllava.models.store import MANIFEST, STAGING, VARIABLE, Store, parsed
from pocketllava.names import open_bundle


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is this user's."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "models"))
    return Store.default()


def add(store: Store, *names: str) -> None:
    for name in names:
        with store.create(name) as folder:
            (folder / MANIFEST).write_text("{}")


def test_models_are_listed_and_found_in_any_case_and_without_their_tag(store: Store) -> None:
    assert store.names() == []
    add(store, "LLaVA-1.5-7B:Q8_0", "llava-1.5-7b:f16", "mine")
    assert store.names() == ["llava-1.5-7b:f16", "llava-1.5-7b:q8_0", "mine"]
    assert store.find("llava-1.5-7b") == "llava-1.5-7b:f16"
    add(store, "llava-1.5-7b:q4_k_m")
    assert store.find("Llava-1.5-7B") == "llava-1.5-7b:q4_k_m"
    assert store.find("llava-1.5-7b:Q8_0") == "llava-1.5-7b:q8_0"
    assert store.folder("mine") == store.root / "mine"
    assert store.name_of(store.folder("llava-1.5-7b:q8_0")) == "llava-1.5-7b:q8_0"
    add(store, "llava-1.5-7b")
    assert store.find("llava-1.5-7b") == "llava-1.5-7b"


def test_other_things_in_its_folder_are_no_models(store: Store) -> None:
    add(store, "mine")
    (store.root / "notes.txt").write_text("x")
    (store.root / "empty").mkdir()
    shutil.copytree(store.root / "mine", store.root / "Not A Name")
    shutil.copytree(store.root / "mine", store.root / ".hidden")
    assert store.names() == ["mine"]
    assert store.name_of(store.root / "Not A Name") is None
    assert store.name_of(store.root.parent / "mine") is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("llava-1.5-7", "llava-1.5-7b:q4_k_m"),
        ("lava-1.5-7b:q4_k_m", "llava-1.5-7b:q4_k_m"),
        ("llava-1.5-7b:q4", "llava-1.5-7b:q4_k_m"),
    ],
)
def test_a_typo_gets_the_nearest(store: Store, name: str, nearest: str) -> None:
    add(store, "llava-1.5-7b:q4_k_m", "other")
    with pytest.raises(ModelNotFound, match=f"did you mean '{nearest}'"):
        store.find(name)
    with pytest.raises(ModelNotFound, match=f"did you mean '{nearest}'"):
        open_bundle(name)


@pytest.mark.parametrize(
    "name",
    ["", "a", "c:q8_0", "../x", "x/y", "x\\y", ".x", "x.", "x:", ":x", "x:y:z", "x@y", "x=y", "nul", "CON", "com1.x:y", "demo", "demo:q",
     "\u00e4b", "\u212aelvin", "x\0", "x\n", "x" * 101, "~x"],
)  # fmt: skip
def test_what_cannot_be_a_name_everywhere_is_one_nowhere(store: Store, name: str) -> None:
    with pytest.raises(InputError):
        store.folder(name)
    with pytest.raises(InputError), store.create(name):
        pass
    assert not store.root.exists()


touched: list[str] = []
recording = False


def record(event: str, args: tuple[Any, ...]) -> None:
    """Which paths this process opens, makes, renames and removes."""
    if recording and (event == "open" or event.startswith(("os.", "shutil."))):
        paths = args[:2] if event in ("os.rename", "os.link", "os.symlink") else args[:1]
        touched.extend(os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike))


PIECES = [
    "..", ".", "/", "\\", ":", "~", "@", "=", "C:", "nul", "con", "\0", "\n", " ", "llava", "1.5", "-7b", "Q4_K_M", "%2e", "\u2024",
    "\uff0f", "mine", "\u212a", ".lock", ".staging", "$HOME", "*", "a", "B",
]  # fmt: skip
NAMES = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(max_size=40)
WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{n}" for kind in ("com", "lpt") for n in range(10))}


@settings(
    max_examples=5000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(name=NAMES)
def test_no_name_reaches_a_path_outside_the_store(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    global recording
    store = watched(tmp_path_factory)
    del touched[:]
    recording = True
    try:
        with suppress(InputError):
            folder = store.folder(name)
            with store.create(name) as staging:
                (staging / MANIFEST).write_text("{}")
            with store.lease(name):
                assert store.find(name) == parsed(name)
            store.remove(name)
            assert folder.parent == store.root
            assert not set('<>:"/\\|?*') & set(folder.name)
            assert not folder.name.endswith((".", " "))
            assert folder.name.partition(".")[0].lower() not in WINDOWS_DEVICES
    finally:
        recording = False
    inside = {MANIFEST}  # rmtree names what is in a folder without its path
    inside |= {path for path in touched if Path(os.path.normpath(path)).is_relative_to(store.root)}
    assert set(touched) <= inside


_watched: list[Store] = []


def watched(factory: pytest.TempPathFactory) -> Store:
    """One store for all examples, in a process whose paths are recorded; hooks cannot be removed."""
    if not _watched:
        store = Store(factory.mktemp("watched").resolve() / "models")
        add(store, "warm")
        store.remove("warm")
        sys.addaudithook(record)
        _watched.append(store)
    return _watched[0]


def test_an_entry_appears_whole_or_not_at_all(store: Store) -> None:
    with suppress(ZeroDivisionError), store.create("mine") as folder:
        (folder / MANIFEST).write_text("{}")
        assert store.names() == []
        raise ZeroDivisionError
    assert store.names() == []
    assert list((store.root / STAGING).iterdir()) == []
    add(store, "mine")
    with (
        pytest.raises(InputError, match=r"there is a model of that name.*pocketllava rm mine"),
        store.create("MINE"),
    ):
        pass
    with store.create("other"), pytest.raises(StateError, match="another process"), store.create("other"):
        pass


def child(store: Store, code: str) -> subprocess.Popen[str]:
    """Another process, once it is in the middle of what it does."""
    program = f"from pathlib import Path\nfrom pocketllava.models.store import Store\nstore = Store(Path({str(store.root)!r}))\n"
    program += f"with {code} as folder:\n    print('inside', flush=True)\n    input()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    return process


@pytest.fixture
def others() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_what_a_killed_process_left_is_removed_by_the_next(
    store: Store, others: list[subprocess.Popen[str]]
) -> None:
    others.append(child(store, "store.create('mine')"))
    with pytest.raises(StateError, match="another process is making it"), store.create("mine"):
        pass
    add(store, "other")  # leaves what lives alone
    assert (store.root / STAGING / "mine").is_dir()
    others[0].kill()
    others[0].wait()
    assert store.names() == ["other"]
    add(store, "third")
    assert not (store.root / STAGING / "mine").exists()
    add(store, "mine")
    assert store.names() == ["mine", "other", "third"]


def test_a_model_in_use_stays_until_its_process_ends(
    store: Store, others: list[subprocess.Popen[str]]
) -> None:
    add(store, "mine:q8_0", "mine:q4_0")
    others.extend(child(store, "store.lease('mine:q8_0')") for _ in range(2))
    for other in others:
        with pytest.raises(StateError, match="is loaded"):
            store.remove("mine:q8_0")
        other.kill()
        other.wait()
    store.remove("mine:q4_0")
    store.remove("mine:q8_0")
    assert store.names() == []
    with pytest.raises(ModelNotFound):
        store.remove("mine")


def test_a_loaded_model_is_in_use_until_it_is_closed(store: Store, bundle: Bundle) -> None:
    with store.create("small:f16") as folder:
        shutil.copytree(bundle.folder, folder, dirs_exist_ok=True)
    with Llava.load("small") as llava:
        assert llava.bundle.folder == store.folder("small:f16")
        with pytest.raises(StateError, match="small:f16: is loaded"):
            store.remove("small")
    with Llava.load(store.folder("small")), pytest.raises(StateError):
        store.remove("small")
    store.remove("small")


def test_a_folder_of_that_name_comes_first(store: Store, bundle: Bundle, here: Path) -> None:
    add(store, "small")
    shutil.copytree(bundle.folder, here / "small")
    assert open_bundle("small").folder == Path("small")


def test_a_link_in_the_store_is_removed_and_not_what_it_points_to(
    store: Store, bundle: Bundle, tmp_path: Path
) -> None:
    store.root.mkdir()
    try:
        (store.root / "linked").symlink_to(bundle.folder, target_is_directory=True)
    except OSError:
        pytest.skip("this user may not make links")
    assert open_bundle("linked").manifest == bundle.manifest
    store.remove("linked")
    assert bundle.model.is_file()
    assert store.names() == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a folder that cannot be written")
def test_a_store_that_cannot_be_written_is_read(store: Store) -> None:
    add(store, "mine")
    store.root.chmod(0o500)
    try:
        with store.lease("mine"):
            assert store.find("mine") == "mine"
    finally:
        store.root.chmod(0o700)


def test_its_place_is_the_users_data_folder_or_the_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Store.default().root.is_absolute()
    assert "pocketllava" in Store.default().root.parts
    monkeypatch.setenv(VARIABLE, "models")
    monkeypatch.chdir(tmp_path)
    assert Store.default().root == tmp_path / "models"
    monkeypatch.setenv(VARIABLE, "~nobody-of-this-name/models")
    assert Store.default().root == tmp_path / "~nobody-of-this-name" / "models"


def test_listing_imports_nothing_that_takes_time() -> None:
    code = "import sys, pocketllava.models.store as s; s.Store.default().names(); print(*{'numpy', 'gguf', 'filelock', 'llama_cpp'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "\n"
    )

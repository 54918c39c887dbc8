"""pull, list, show, verify and rm: a hub on loopback into this user's store, with real small models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import MakeBundle, MakeCheckpoint
from gguf import GGUFValueType
from hub import COMMIT, Fault, LocalHub, serving
from test_repair import DEPTH, PROJECTOR, rewritten

from pocketllava import Bundle, ConvertError, DiskFull, InputError, Llava, ModelNotFound, Options, StateError
from pocketllava.cli import cli
from pocketllava.download import pull
from pocketllava.download.transfer import BLOCK_BYTES
from pocketllava.models.bundle import MMPROJ, MODEL
from pocketllava.models.store import DOWNLOADS, VARIABLE, Store

pytestmark = pytest.mark.slow
PAIR, CHECKPOINT = "owner/Small-GGUF", "owner/small-hf"


@pytest.fixture
def hub(
    bundle: Bundle, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LocalHub]:
    """A hub with a small model as two GGUF files and as a checkpoint; this user's store is empty."""
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    pair = {"small-F16.gguf": bundle.model.read_bytes(), "mmproj-model-f16.gguf": bundle.mmproj.read_bytes()}
    checkpoint = {path.name: path.read_bytes() for path in make_checkpoint().iterdir() if path.is_file()}
    with serving(LocalHub({PAIR: pair, CHECKPOINT: {"README.md": b"# small", **checkpoint}})) as local:
        monkeypatch.setenv("HF_ENDPOINT", local.endpoint)
        monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
        yield local


def run(*args: str) -> Result:
    """A command; what goes wrong is raised."""
    return CliRunner().invoke(cli, args, catch_exceptions=False, standalone_mode=False)


def left(store: Store) -> list[str]:
    """What is in the store besides models: their names, and what downloads left."""
    return sorted(path.name for path in (store.root / DOWNLOADS).glob("*"))


def test_two_gguf_files_become_a_model_that_answers_as_the_bundle_they_are_from(
    hub: LocalHub, bundle: Bundle
) -> None:
    pulled = pull(PAIR)
    assert (pulled.name, pulled.fresh) == ("small:f16", True)
    assert pulled.bundle.manifest.source.id == PAIR
    assert pulled.bundle.manifest.source.revision == COMMIT
    assert pulled.bundle.model.read_bytes() == bundle.model.read_bytes()
    assert left(Store.default()) == []
    options = Options(max_tokens=8)
    with Llava.load("small") as ours, Llava.load(bundle.folder) as theirs:
        assert (
            ours.ask(None, "Hello", options=options).token_ids
            == theirs.ask(None, "Hello", options=options).token_ids
        )


def test_a_checkpoint_is_converted_and_not_kept(hub: LocalHub) -> None:
    pulled = pull(f"{CHECKPOINT}@v1", quant="Q8_0")
    assert pulled.name == "small:q8_0"
    assert pulled.bundle.manifest.types.model == "Q8_0"
    assert pulled.bundle.manifest.source.id == CHECKPOINT
    assert sorted(path.name for path in pulled.bundle.folder.iterdir()) == ["bundle.json", MMPROJ, MODEL]
    assert left(Store.default()) == []
    assert not any("README" in request.path for request in hub.requests)


def test_a_checkpoint_can_be_kept(hub: LocalHub, make_checkpoint: MakeCheckpoint) -> None:
    folder = pull(CHECKPOINT, quant="F16", name="mine", keep=True).bundle.folder / "checkpoint"
    assert (folder / "config.json").read_bytes() == (make_checkpoint() / "config.json").read_bytes()


def test_a_second_pull_asks_for_nothing_but_the_list(hub: LocalHub) -> None:
    pull(PAIR)
    n = len(hub.requests)
    assert not pull(PAIR).fresh
    assert len(hub.requests) == n + 1
    with pytest.raises(InputError, match="there is a model of that name"):
        pull(CHECKPOINT, quant="F16")
    assert pull(PAIR, name="mine").name == "mine:f16"


def test_two_processes_at_once_pull_one_model_once(hub: LocalHub) -> None:
    hub.bytes_per_s = 5e6
    command = [sys.executable, "-m", "pocketllava", "pull", PAIR]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    ends = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert [out for out, _ in ends] == ["small:f16\n"] * 2
    assert sorted("is in the store already" in told for _, told in ends) == [False, True]
    assert len(hub.for_bytes()) == 2


def test_a_stopped_pull_leaves_no_model_and_is_continued(hub: LocalHub) -> None:
    hub.faults = [Fault("none"), Fault("cut", 50_000), Fault("status", status=404)]
    with pytest.raises(ModelNotFound):
        pull(PAIR)
    store = Store.default()
    assert store.names() == []
    assert any(name.endswith(".part") for name in left(store))
    assert "of stopped downloads" in run("list").stderr
    pull(PAIR)
    assert hub.sent < sum(map(len, hub.repos[PAIR].values())) + BLOCK_BYTES
    assert left(store) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is POSIX's")
def test_twenty_kills_leave_no_model_and_lose_nothing_that_was_on_the_disk(hub: LocalHub) -> None:
    hub.bytes_per_s = 1e6
    store, whole = (
        Store.default(),
        {hashlib.sha256(data).hexdigest(): data for data in hub.repos[PAIR].values()},
    )
    kills = 0
    for n in range(20):
        asked = len(hub.for_bytes())
        with subprocess.Popen(
            [sys.executable, "-m", "pocketllava", "pull", PAIR], stderr=subprocess.PIPE
        ) as child:
            while len(hub.for_bytes()) == asked and child.poll() is None:
                time.sleep(0.001)
            time.sleep(0.005 * n)
            child.send_signal(signal.SIGKILL)
        kills += child.returncode == -signal.SIGKILL
        assert store.names() == []
        for path in (store.root / DOWNLOADS).glob("sha256-*"):
            data, suffix = whole[path.stem.removeprefix("sha256-")], path.suffix
            assert (
                suffix in (".lock", ".etag")
                or (suffix and data.startswith(path.read_bytes()))
                or data == path.read_bytes()
            )
    assert kills == 20
    pull(PAIR)
    assert [request.headers.get("Range") for request in hub.for_bytes()].count(None) <= 4
    assert run("verify").stdout == "small:f16: as recorded\n"
    assert left(store) == []


def test_what_stopped_downloads_left_can_be_removed(hub: LocalHub) -> None:
    hub.faults = [Fault("cut", 50_000), Fault("status", status=404)]
    with pytest.raises(ModelNotFound):
        pull(PAIR)
    run("rm", "--unfinished")
    assert [name for name in left(Store.default()) if not name.endswith(".lock")] == []


def test_a_model_that_cannot_be_converted_is_refused_before_its_weights(hub: LocalHub) -> None:
    config = json.loads(hub.repos[CHECKPOINT]["config.json"])
    hub.repos[CHECKPOINT]["config.json"] = json.dumps(
        {**config, "model_type": "qwen2_vl", "architectures": ["Qwen2VL"]}
    ).encode()
    with pytest.raises(ConvertError, match="Qwen2VL"):
        pull(CHECKPOINT)
    assert not any("safetensors" in request.path for request in hub.requests)
    assert Store.default().names() == []


def test_an_old_mmproj_is_mended_on_the_way(hub: LocalHub, bundle: Bundle, tmp_path: Path) -> None:
    old = rewritten(bundle.mmproj, tmp_path / "old.gguf", drop=(PROJECTOR, DEPTH))
    hub.repos[PAIR]["mmproj-model-f16.gguf"] = old.read_bytes()
    mended = pull(PAIR).bundle
    assert mended.mmproj_info == bundle.mmproj_info
    with Llava.load(mended.folder) as llava:
        assert llava.ask(None, "Hello", max_tokens=2).token_ids


def test_another_models_projector_is_refused_before_the_text_model(
    hub: LocalHub, bundle: Bundle, tmp_path: Path
) -> None:
    put = {PROJECTOR: ("qwen2vl_merger", GGUFValueType.STRING)}
    other = rewritten(bundle.mmproj, tmp_path / "other.gguf", put=put)
    hub.repos[PAIR]["mmproj-model-f16.gguf"] = other.read_bytes()
    with pytest.raises(ConvertError, match="qwen2vl_merger"):
        pull(PAIR)
    assert [request.path.split("?")[0] for request in hub.for_bytes()] == [
        f"/{PAIR}/files/mmproj-model-f16.gguf"
    ]
    assert Store.default().names() == []


def test_a_projector_of_another_width_is_refused(
    hub: LocalHub, bundle: Bundle, make_bundle: MakeBundle
) -> None:
    hub.repos[PAIR]["small-F16.gguf"] = make_bundle(hidden=128).model.read_bytes()
    with pytest.raises(ConvertError, match="projects to width"):
        pull(PAIR)
    assert Store.default().names() == []


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type(usage)(usage.total, usage.used, 1 << 20))
    with pytest.raises(DiskFull, match=r"0\.00 GB free, .* POCKETLLAVA_HOME"):
        pull(PAIR)
    assert hub.for_bytes() == []


def test_offline_nothing_is_asked_and_no_socket_is_opened(hub: LocalHub) -> None:
    code = """
import sys
sys.addaudithook(lambda event, _: event.startswith("socket.") and sys.exit(f"opened: {event}"))
from pocketllava.cli import cli
from pocketllava.errors import InputError
for command in (["pull", "owner/model"], ["list"]):
    try:
        cli.main(command, standalone_mode=False)
    except InputError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("HF_HUB_OFFLINE is set, so nothing is downloaded")


def test_the_commands_tell_and_remove_what_is_there(hub: LocalHub) -> None:
    assert run("list").stdout == ""
    assert run("pull", PAIR, "-q").stdout == "small:f16\n"
    (row,) = json.loads(run("list", "--json").stdout)
    assert (row["name"], row["source"], row["revision"]) == ("small:f16", PAIR, COMMIT)
    assert run("list").stdout.startswith("small:f16  F16 + F16  ")
    assert f"{PAIR}@{COMMIT}" in run("show", "small").stdout
    about: dict[str, Any] = json.loads(run("show", "small", "--json").stdout)
    assert [record["sha256"] for record in about["files"].values()]
    assert run("verify").stdout == "small:f16: as recorded\n"
    with pytest.raises(InputError, match="--yes"):
        run("rm", "small")
    with Llava.load("small"), pytest.raises(StateError, match="is loaded"):
        run("rm", "small", "--yes")
    run("rm", "small", "--yes")
    assert run("list").stdout == ""


def test_a_changed_byte_fails_verify(hub: LocalHub) -> None:
    model = pull(PAIR).bundle.model
    with model.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    result = run("verify", "small")
    assert result.return_value == 1
    assert "SHA-256 is" in result.stderr

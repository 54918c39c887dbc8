"""Downloads from a hub on loopback, with every fault: a file is whole and hashed under its name, or it is not there."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import COMMIT, Fault, LocalHub, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketllava import DiskFull, DownloadError, InputError, ModelNotFound
from pocketllava.download import choice
from pocketllava.download.hub import Hub, HubFile, Listing, Patience
from pocketllava.download.transfer import BLOCK_BYTES, Downloads

REPO, NAME = "owner/model", "weights.bin"
DATA = random.Random(1).randbytes(300_000)
QUICK = Patience(connect_s=2, read_s=0.3, tries=3, pause_s=0.001)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A hub with one large and one small file; nothing says that we are offline."""
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serving(LocalHub({REPO: {NAME: DATA, "config.json": b"{}"}})) as local:
        yield local


def fetched(hub: LocalHub, folder: Path, patience: Patience = QUICK, name: str = NAME) -> bytes:
    """One run of a download."""
    here = Hub(hub.endpoint, patience)
    listing = here.listing(REPO, None)
    file = listing.named(name)
    assert file is not None
    file = here.measured(listing, file)
    return Downloads(folder, here).get(file, here.url(listing, name), lambda _: None).read_bytes()


def whole_files(folder: Path) -> list[Path]:
    """Files under a final name."""
    return [path for path in folder.glob("sha*") if not path.suffix]


def ranges(hub: LocalHub) -> list[str]:
    return [request.headers.get("Range", "") for request in hub.for_bytes()]


@pytest.mark.parametrize("offset", range(0, len(DATA), len(DATA) // 50))
def test_a_file_that_is_cut_anywhere_is_continued_there_by_the_next_run(
    hub: LocalHub, tmp_path: Path, offset: int
) -> None:
    hub.faults = [Fault("cut", offset)]
    with pytest.raises(DownloadError, match=r"not whole, \d+ of 300000 bytes are here"):
        fetched(hub, tmp_path, Patience(tries=1))
    assert not whole_files(tmp_path)
    assert fetched(hub, tmp_path) == DATA
    start = offset // BLOCK_BYTES * BLOCK_BYTES
    assert ranges(hub) == ["", f"bytes={start}-" if start else ""]
    assert hub.sent == len(DATA) + offset - start


def test_within_a_run_it_is_asked_again_as_long_as_bytes_come(hub: LocalHub, tmp_path: Path) -> None:
    hub.faults = [Fault("cut", BLOCK_BYTES)] * 10
    assert fetched(hub, tmp_path) == DATA
    assert ranges(hub) == ["", *(f"bytes={n * BLOCK_BYTES}-" for n in range(1, 11))]


@pytest.mark.parametrize(
    "faults",
    [
        [Fault("status", status=503)] * 2,
        [Fault("status", status=429)] * 2,
        [Fault("status", status=416)],
        [Fault("cut", 20_000), Fault("status", status=416)],
        [Fault("cut", 20_000), Fault("other range")],
        [Fault("cut", 20_000), Fault("no ranges")],
        [Fault("stall", 20_000, seconds=1.0), Fault("stall", 0, seconds=1.0)],
        [Fault("shorter")],
        [Fault("longer")],
        [Fault("no length")],
        [Fault("wrong bytes")],
        [Fault("cut", 20_000), Fault("wrong bytes")],
    ],
    ids=lambda faults: " then ".join(
        f"{fault.kind} {fault.status if fault.kind == 'status' else ''}" for fault in faults
    ),
)
def test_a_fault_that_passes_is_gone_with_the_next_try(
    hub: LocalHub, tmp_path: Path, faults: list[Fault]
) -> None:
    hub.faults = faults
    assert fetched(hub, tmp_path) == DATA
    assert not hub.faults


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("status", status=503), "HTTP status 503"),
        (Fault("stall", 0, seconds=1.0), r"silent for 0\.3 s"),
        (Fault("shorter"), "the server has 299995 bytes, the hub names 300000"),
        (Fault("longer"), "the server has 300004 bytes"),
        (Fault("wrong bytes"), "another hash"),
        (Fault("status", status=416), "another range"),
    ],
)
def test_a_fault_that_stays_leaves_no_file_and_says_why(
    hub: LocalHub, tmp_path: Path, fault: Fault, message: str
) -> None:
    hub.faults = [fault] * 50
    with pytest.raises(DownloadError, match=message):
        fetched(hub, tmp_path)
    assert not whole_files(tmp_path)
    hub.faults.clear()
    assert fetched(hub, tmp_path) == DATA


def test_a_server_that_only_pretends_to_know_ranges_is_given_up(hub: LocalHub, tmp_path: Path) -> None:
    hub.faults = [Fault("cut", 20_000), Fault("status", status=416)] * 50
    with pytest.raises(DownloadError):
        fetched(hub, tmp_path)
    assert len(hub.for_bytes()) < 10


def test_a_file_that_changed_on_the_server_is_asked_for_whole(hub: LocalHub, tmp_path: Path) -> None:
    hub.faults = [Fault("cut", 20_000)]
    with pytest.raises(DownloadError):
        fetched(hub, tmp_path, Patience(tries=1))
    hub.etag = "e2"
    assert fetched(hub, tmp_path) == DATA
    assert hub.for_bytes()[-1].headers["If-Range"] == '"e1"'


def test_a_repository_that_moved_is_followed(hub: LocalHub, tmp_path: Path) -> None:
    hub.moved = {"old/name": REPO}
    here = Hub(hub.endpoint, QUICK)
    listing = here.listing("old/name", None)
    file = listing.files[0]
    assert (
        Downloads(tmp_path, here).get(file, here.url(listing, file.name), lambda _: None).read_bytes() == DATA
    )


def test_a_missing_file_and_a_gated_repository_are_said_at_once(hub: LocalHub, tmp_path: Path) -> None:
    here = Hub(hub.endpoint, QUICK)
    with pytest.raises(ModelNotFound, match="no such repository"):
        here.listing("owner/other", None)
    with pytest.raises(ModelNotFound, match="no such repository, revision"):
        here.listing(REPO, "v2")
    with pytest.raises(ModelNotFound, match=r"private or gated.*HF_TOKEN"):
        here.listing("private/model", None)
    assert len(hub.requests) == 3


def test_the_token_goes_to_the_hub_and_to_nobody_else(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert fetched(hub, tmp_path) == DATA
    sent = {request.on_cdn: request.headers.get("Authorization") for request in hub.requests}
    assert sent == {False: "Bearer hf_right", True: None}


def test_a_token_with_a_line_break_is_not_quoted(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_se\u00e4cret")
    with pytest.raises(InputError, match="HF_TOKEN") as caught:
        Hub(hub.endpoint, QUICK).listing(REPO, None)
    assert "cret" not in str(caught.value)


def test_addresses_of_the_cdn_with_their_keys_are_not_shown(hub: LocalHub, tmp_path: Path) -> None:
    here = Hub(hub.endpoint, QUICK)
    listing = here.listing(REPO, None)
    hub.cdn = "http://127.0.0.1:9"  # nobody listens there
    file = listing.files[0]
    with pytest.raises(DownloadError, match="no connection") as caught:
        Downloads(tmp_path, here).get(file, here.url(listing, file.name), lambda _: None)
    assert "secret" not in str(caught.value)


def test_a_mirror_without_hashes_in_its_listing_has_them_in_headers(hub: LocalHub, tmp_path: Path) -> None:
    hub.hashes = False
    assert fetched(hub, tmp_path) == DATA
    assert fetched(hub, tmp_path, name="config.json") == b"{}"
    names = [path.name for path in whole_files(tmp_path)]
    assert f"sha256-{hashlib.sha256(DATA).hexdigest()}" in names


def test_the_hub_is_huggingfaces_or_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert Hub.default().endpoint == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/hf/")
    assert Hub.default().endpoint == "https://hub.example/hf"
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(InputError, match="HF_ENDPOINT"):
        Hub.default()


def test_a_full_disk_keeps_what_is_there(hub: LocalHub, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    here = Hub(hub.endpoint, QUICK)
    listing = here.listing(REPO, None)
    file = listing.files[0]
    (tmp_path / f"{file.key}.part").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="the disk is full, 300000 more bytes are needed"):
        Downloads(tmp_path, here).get(file, here.url(listing, file.name), lambda _: None)


def test_two_threads_of_one_file_download_it_once(hub: LocalHub, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    hub.bytes_per_s = 1e6
    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(fetched, hub, tmp_path) for _ in range(2)]
        assert [result.result(timeout=60) for result in results] == [DATA, DATA]
    assert hub.sent == len(DATA)


SOURCES = {
    "llava-hf/llava-1.5-7b-hf": ("llava-hf/llava-1.5-7b-hf", None, None, "llava-1.5-7b"),
    "hf://llava-hf/llava-1.5-7b-hf@v1": ("llava-hf/llava-1.5-7b-hf", "v1", None, "llava-1.5-7b"),
    "hf://a/b@refs/pr/3": ("a/b", "refs/pr/3", None, "model"),
    "second-state/Llava-v1.5-7B-GGUF:q5_k_m": (
        "second-state/Llava-v1.5-7B-GGUF",
        None,
        "Q5_K_M",
        "llava-v1.5-7b",
    ),
    "mys/ggml_llava-v1.5-7b:q4_k": ("mys/ggml_llava-v1.5-7b", None, "Q4_K_M", "llava-v1.5-7b"),
    "hf.co/mys/ggml_llava-v1.5-13b": ("mys/ggml_llava-v1.5-13b", None, None, "llava-v1.5-13b"),
    "https://huggingface.co/Mozilla/llava-v1.5-7b-llamafile/": (
        "Mozilla/llava-v1.5-7b-llamafile",
        None,
        None,
        "llava-v1.5-7b",
    ),
}


@pytest.mark.parametrize("text", SOURCES)
def test_a_source_is_a_hub_id_with_or_without_what_people_write_around_it(text: str) -> None:
    source = choice.source(text)
    assert (source.repo, source.revision, source.quant, choice.default_name(source.repo)) == SOURCES[text]


@pytest.mark.parametrize(
    "text", ["", "llava", "a/b/c", "../b", "https://example.com/a/b", "a/b:", "a/../b", "hf://a"]
)
def test_other_texts_are_no_source(text: str) -> None:
    with pytest.raises(InputError, match="no hub id"):
        choice.source(text)


def listing(*names: str) -> Listing:
    return Listing(REPO, COMMIT, tuple(HubFile(name, 10, "0" * 64, None) for name in names))


# Published repositories, as ../shared/serving.md lists their files.
MYS = listing("ggml-model-f16.gguf", "ggml-model-q4_k.gguf", "ggml-model-q5_k.gguf", "mmproj-model-f16.gguf")
SECOND_STATE = listing(
    "llava-v1.5-7b-Q2_K.gguf",
    "llava-v1.5-7b-Q4_K_M.gguf",
    "llava-v1.5-7b-Q8_0.gguf",
    "llava-v1.5-7b-mmproj-model-f16.gguf",
)
MOZILLA = listing(
    "llava-v1.5-7b-Q4_K.gguf", "llava-v1.5-7b-Q4_K.llamafile", "llava-v1.5-7b-Q8_0.gguf", "llava-v1.5-7b-f16.gguf",
    "llava-v1.5-7b-mmproj-Q4_0.gguf", "llava-v1.5-7b-mmproj-Q8_0.gguf", "llava-v1.5-7b-mmproj-f16.gguf",
)  # fmt: skip
FOLDERS = listing("7b/model-q4_0.gguf", "7b/mmproj.gguf", "13b/model-q4_k_m.gguf", "13b/mmproj.gguf")


@pytest.mark.parametrize(
    ("repo", "quant", "mmproj", "expected"),
    [
        (MYS, None, None, ("ggml-model-q4_k.gguf", "mmproj-model-f16.gguf")),
        (MYS, "Q5_K_M", None, ("ggml-model-q5_k.gguf", "mmproj-model-f16.gguf")),
        (SECOND_STATE, None, None, ("llava-v1.5-7b-Q4_K_M.gguf", "llava-v1.5-7b-mmproj-model-f16.gguf")),
        (MOZILLA, "Q8_0", None, ("llava-v1.5-7b-Q8_0.gguf", "llava-v1.5-7b-mmproj-f16.gguf")),
        (MOZILLA, "F16", "Q8_0", ("llava-v1.5-7b-f16.gguf", "llava-v1.5-7b-mmproj-Q8_0.gguf")),
        (FOLDERS, None, None, ("13b/model-q4_k_m.gguf", "13b/mmproj.gguf")),
        (FOLDERS, "Q4_0", None, ("7b/model-q4_0.gguf", "7b/mmproj.gguf")),
    ],
)
def test_a_text_model_and_the_mmproj_beside_it_are_chosen(
    repo: Listing, quant: str | None, mmproj: str | None, expected: tuple[str, str]
) -> None:
    pair = choice.pair(repo, quant, mmproj)
    assert pair is not None
    assert (pair.model.name, pair.mmproj.name) == expected


def test_what_a_repository_lacks_is_named() -> None:
    with pytest.raises(InputError, match=r"no text model of type Q5_K_M.*there are Q2_K, Q4_K_M, Q8_0"):
        choice.pair(SECOND_STATE, "Q5_K_M", None)
    with pytest.raises(InputError, match=r"no mmproj file among model\.gguf"):
        choice.pair(listing("model.gguf"), None, None)
    with pytest.raises(InputError, match=r"no text model in one \.gguf file"):
        choice.pair(listing("mmproj.gguf", "big-00001-of-00002.gguf"), None, None)
    assert choice.pair(listing("config.json"), None, None) is None


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.text(max_size=30) | st.sampled_from(["config.json", "../config.json", "a/model.safetensors"]),
        max_size=8,
    )
)
def test_a_checkpoints_files_are_names_and_never_paths(names: list[str]) -> None:
    try:
        chosen = choice.checkpoint(listing("config.json", *names))
    except InputError:
        return
    assert all(Path(file.name).name == file.name and not file.name.startswith(".") for file in chosen)

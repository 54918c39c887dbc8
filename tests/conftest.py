"""Fixtures: checkpoints, bundles and loaded models, each made once a run; nothing is faked."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import small_checkpoint
from filelock import FileLock
from hypothesis import settings
from PIL import Image
from small_checkpoint import Layout

from pocketllava import Bundle, Llava
from pocketllava.convert import convert

# A seed in the suite, a campaign in `make attack`; timings live in benchmarks, not in deadlines.
settings.register_profile("suite", deadline=None, max_examples=50)
settings.register_profile("campaign", deadline=None, max_examples=300)
settings.load_profile("suite")


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker of pytest-xdist a core of its own: ggml's threads wait by spinning, and share badly.

    What this user has in the store is nothing to the tests.
    """
    os.environ["POCKETLLAVA_HOME"] = str(Path(tempfile.gettempdir()) / "no-store-of-pocketllava")
    worker = getattr(config, "workerinput", {}).get("workerid", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


# What takes longest, left out by `make test-fast`: whole conversions, children, every type of quantization.
SLOW = (
    "album", "answers", "attack_files", "attack_gguf", "bad_checkpoints", "bench", "cache", "chat",
    "chat_template", "children", "cli", "completion", "convert", "damage", "demo", "device_caches", "docs",
    "doctor", "download", "evaluation", "examples", "exports", "foreign", "foreign_commands",
    "hostile_pictures", "image_tokens", "imatrix", "import", "interrupts", "isolated", "limits",
    "llamafile", "manifest", "mmproj_contract", "odd_checkpoints", "openapi", "original", "page",
    "page_odd", "pickled", "places", "plan", "prefixes", "published", "pull", "quantize", "ray",
    "recorded_bodies", "repair", "scale", "serve", "serve_faults", "store", "streams", "structured",
    "text_contract", "tiled", "tiled_convert", "usage", "variants",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow files' tests."""
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--record: write what transformers gives (with `-m reference`)."""
    parser.addoption("--record", action="store_true", help="write transformers' results to tests/recorded/")


MakeCheckpoint = Callable[..., Path]
MakeBundle = Callable[..., Bundle]
Shared = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """shared(name, fill) -> a folder that fill(folder) wrote, once a run, by the worker that asks first."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)

    def get(name: str, fill: Callable[[Path], object]) -> Path:
        folder, part = root / name, root / f"{name}.part"
        with FileLock(root / f"{name}.lock"):
            if not folder.exists():
                shutil.rmtree(part, ignore_errors=True)  # of a test that failed here
                part.mkdir()
                fill(part)
                part.rename(folder)
        return folder

    return get


def digest(*values: object) -> str:
    """A folder's name for what was asked for, the same in every worker."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """make_checkpoint(**layout) -> the checkpoint's folder; the same layout is written once a worker."""
    made: dict[Layout, Path] = {}

    def make(**changes: object) -> Path:
        layout = Layout(**changes)  # type: ignore[arg-type]
        if layout not in made:
            folder = tmp_path_factory.mktemp(f"checkpoint-{digest(layout)}", numbered=False)
            made[layout] = small_checkpoint.write(folder, layout)
        return made[layout]

    return make


@pytest.fixture(scope="session")
def make_bundle(make_checkpoint: MakeCheckpoint, shared: Shared) -> MakeBundle:
    """make_bundle(quant, mmproj, **layout) -> a converted bundle; the same one is converted once a run."""
    made: dict[object, Bundle] = {}

    def make(quant: str = "F16", mmproj: str = "F16", **changes: object) -> Bundle:
        key = (quant, mmproj, Layout(**changes))  # type: ignore[arg-type]
        if key not in made:

            def fill(folder: Path) -> None:
                convert(make_checkpoint(**changes), folder / "bundle", quant=quant, mmproj=mmproj)

            made[key] = Bundle.open(shared(f"bundle-{digest(key)}", fill) / "bundle")
        return made[key]

    return make


@pytest.fixture(scope="session")
def bundle(make_bundle: MakeBundle) -> Bundle:
    """An F16 bundle of the hub's layout."""
    return make_bundle()


@pytest.fixture(scope="session")
def endless(make_bundle: MakeBundle) -> Bundle:
    """A bundle whose greedy answers end at max_tokens only."""
    return make_bundle(endless=True)


@pytest.fixture(scope="session")
def llava(bundle: Bundle) -> Iterator[Llava]:
    """The same bundle, loaded."""
    with Llava.load(bundle.folder) as model:
        yield model


@pytest.fixture(scope="session")
def attacked(shared: Shared) -> Path:
    """A folder with the bundles that attacks on GGUF files damage copies of."""
    from attack.gguf_files import whole_bundles

    return shared("attacked", whole_bundles)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with three pictures; home is there too."""
    monkeypatch.chdir(tmp_path)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    for name, size in (("a.png", (8, 6)), ("my photo.jpg", (9, 9)), ("b.PNG", (7, 8))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    return tmp_path

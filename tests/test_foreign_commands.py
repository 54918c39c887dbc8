"""Commands that take GGUF files as they are: plan, quantize, list; a projector that two processes mend at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from test_repair import hub_file

from pocketllava import Bundle, Llava
from pocketllava.cli import cli
from pocketllava.convert.pair import TEMPLATES
from pocketllava.models.bundle import MANIFEST, MODEL
from pocketllava.models.store import VARIABLE

PHOTO = str(Path(__file__).parent / "photo.jpg")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test's own, which children take too; the store is elsewhere."""
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    return tmp_path / "cache"


@pytest.fixture
def lying(bundle: Bundle, tmp_path: Path) -> tuple[str, str]:
    """A text model and, in another folder, its mmproj as the hub has it."""
    for name in ("text", "vision"):
        (tmp_path / name).mkdir()
    model = shutil.copy(bundle.model, tmp_path / "text" / "llava-v1.5-7b-f16.gguf")
    return str(model), str(hub_file(bundle.mmproj, tmp_path / "vision" / "mmproj-model-f16.gguf"))


def run(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == code, (done.output, done.exception)
    return done


def test_a_plan_of_a_pair_that_lies_in_two_folders(lying: tuple[str, str], cache: Path) -> None:
    model, mmproj = lying
    planned = json.loads(run("plan", model, "--mmproj", mmproj, "--json").stdout)
    assert planned["verdict"] == "fits"
    assert planned["total"] == Llava.plan(model, mmproj=mmproj).total


def test_quantize_takes_a_pair_of_floats(lying: tuple[str, str], cache: Path, tmp_path: Path) -> None:
    model, mmproj = lying
    out = str(tmp_path / "q4")
    pair = ("--mmproj-file", mmproj, "--template", "mistral", "--crop")
    run("quantize", model, "-o", out, "--quant", "Q4_K_M", "--mmproj", "Q8_0", *pair, "-q")
    made = Bundle.open(out)
    assert (made.manifest.types.model, made.manifest.types.mmproj) == ("Q4_K_M", "Q8_0")
    assert made.template == TEMPLATES["mistral"]
    assert not made.manifest.references
    with Llava.load(made.folder) as llava:
        assert llava.ask(PHOTO, "What is it?", max_tokens=3).text
    again = CliRunner().invoke(cli, ["quantize", out, "-o", str(tmp_path / "q5"), "--quant", "Q5_K_M"])
    assert "quantized already" in str(again.exception)


def test_list_says_whose_files_a_model_refers_to(lying: tuple[str, str], cache: Path) -> None:
    model, mmproj = lying
    run("import", model, "--mmproj", mmproj, "--as", "mine")
    assert f"(refers to files of {Path(model).parent})" in run("list").stdout
    (row,) = json.loads(run("list", "--json").stdout)
    assert row["references"] == [{"file": MODEL, "path": model, "owner": None, "there": True}]
    Path(model).unlink()
    assert f"; missing: {model})" in run("list").stdout


def test_processes_at_once_mend_one_projector_once(
    lying: tuple[str, str], cache: Path, tmp_path: Path
) -> None:
    model, mmproj = lying
    home = tmp_path  # the cache lies in it, on every system
    code = (
        "import sys; from pocketllava.names import open_bundle;"
        " print(open_bundle(sys.argv[1], mmproj=sys.argv[2]).mmproj)"
    )
    command = [sys.executable, "-I", "-c", code, model, mmproj]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {child.communicate(timeout=120)[0] for child in children}
    assert {child.returncode for child in children} == {0}
    assert len(printed) == 1
    assert len(list(home.rglob("projectors/*.gguf"))) == len(list(home.rglob(MANIFEST))) == 1
    assert not list(home.rglob("*.partial"))

"""Names of models: folders, "demo", and what a wrong name is answered with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pocketllava import Bundle, InputError, Llava, ModelNotFound
from pocketllava.names import open_bundle


@pytest.fixture
def beside(bundle: Bundle, here: Path) -> Path:
    """A folder to be in, with the bundles llava-7b and llava-13b."""
    for name in ("llava-7b", "llava-13b"):
        shutil.copytree(bundle.folder, here / name)
    return here


def test_a_hub_id_gets_the_command_that_converts_it(here: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        Llava.load("llava-hf/llava-1.5-7b-hf")
    assert str(caught.value).endswith("pocketllava convert llava-hf/llava-1.5-7b-hf --out llava-1.5-7b-hf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lava-7b", "did you mean 'llava-7b'"),
        ("LLAVA-13B", "did you mean 'llava-13b'"),
        ("dmeo", "did you mean 'demo'"),
        ("./llava7b", "did you mean 'llava-7b'"),
        ("nothing alike", "there are llava-13b, llava-7b beside it"),
        ("x" * 300, "found nothing"),
        ("nul\0", "found nothing"),
        ("~nobody/llava", "found nothing"),
    ],
)
def test_a_mistyped_name_gets_the_nearest(beside: Path, name: str, message: str) -> None:
    if name.isupper() and (beside / name).exists():
        pytest.skip("this file system does not tell cases apart")
    with pytest.raises(ModelNotFound) as caught:
        open_bundle(name)
    assert message in str(caught.value)
    assert "pocketllava convert" in str(caught.value)


def test_a_folder_called_demo_comes_before_the_name(bundle: Bundle, here: Path) -> None:
    assert open_bundle("demo").folder != here / "demo"
    (here / "demo").write_text("a file is no bundle")
    assert open_bundle("demo").folder.name.startswith("demo-")
    (here / "demo").unlink()
    shutil.copytree(bundle.folder, here / "demo")
    assert open_bundle("demo").manifest == bundle.manifest
    assert open_bundle(Path("~/demo")).manifest == bundle.manifest  # home is here


@pytest.mark.parametrize("name", ["", None, 5, b"demo", Path])
def test_what_is_no_name_is_an_input_error(name: Any) -> None:
    with pytest.raises(InputError, match=r"^model: found .*, expected a bundle's folder or 'demo'"):
        open_bundle(name)

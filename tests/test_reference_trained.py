"""Really trained weights against transformers in float32: benchmarks/trained.py's checkpoint, fewer questions."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketllava import Llava
from pocketllava.convert import convert

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
FILE = Path(__file__).parents[1] / "benchmarks" / "trained.py"
NEAR_TIE = 0.1  # of a logit: the lead of the reference's token where an F16 model's answer parts


@pytest.fixture(scope="module")
def trained() -> Iterator[Any]:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("trained", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trained"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["trained"]


def test_features_and_answers(trained: Any, tmp_path: Path) -> None:
    try:
        trained.packages()
    except OSError as error:
        pytest.skip(str(error))
    folder = trained.checkpoint(tmp_path / "checkpoint")
    questions = [*trained.asked(4)[:4], trained.asked()[-1]]
    expected = trained.reference(folder, questions)
    errors = {}
    for kind in ("F16", "Q8_0"):
        bundle = convert(folder, tmp_path / kind, quant="F16", mmproj=kind)
        with Llava.load(bundle.folder) as llava:
            errors[kind] = trained.feature_errors(llava, expected)
            if kind == "F16":
                equal, leads = trained.answers(llava, expected)
    print(
        f"\n(all, mean of tokens, worst token): {errors}; {equal} of {len(questions)} answers equal, leads {leads}"
    )
    assert errors["F16"][0] <= 4e-3  # the tower's GELU by the tanh formula
    assert errors["F16"][2] <= 8e-3
    assert errors["Q8_0"][0] <= 5e-2
    assert all(lead <= NEAR_TIE for lead in leads)

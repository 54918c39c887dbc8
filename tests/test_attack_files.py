"""Damaged files and lines end in one line: a small part of the campaigns in tests/attack, and every input that once did not."""

from __future__ import annotations

from pathlib import Path

import pytest
from attack import files
from attack.child import outcome

CASES = 120
CORPUS = sorted(path for path in files.CORPUS.glob("*/*") if path.is_file())


def test_the_campaigns(tmp_path: Path) -> None:
    """All in one test, as all run in one child."""
    for name, counts in files.run(list(files.TARGETS), 7, CASES, tmp_path).items():
        assert counts.failures == [], name
        assert counts.refused + counts.accepted == CASES, name
        assert counts.accepted, name


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_corpus(path: Path, tmp_path: Path) -> None:
    kind, detail = outcome(files.TARGETS[path.parent.name.replace("-", " ")], path.read_bytes(), tmp_path)
    assert (kind, detail) in (("refused", ""), ("accepted", ""))


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) >= 20
    assert {path.parent.name.replace("-", " ") for path in CORPUS} <= set(files.TARGETS)

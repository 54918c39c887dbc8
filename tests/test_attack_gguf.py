"""A small campaign of damaged GGUF files through every way in; `make attack` runs a large one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from attack import gguf_files as attack

MUTANTS = int(os.environ.get("POCKETLLAVA_MUTANTS", "60"))
SEED = int(os.environ.get("POCKETLLAVA_SEED", "0"))


@pytest.fixture(scope="module")
def whole(attacked: Path) -> dict[str, Path]:
    """The bundles whose files are damaged."""
    return {name: attacked / name for name in attack.LAYOUTS}


@pytest.fixture(scope="module")
def child() -> Iterator[attack.Child]:
    """The process that takes files in; it starts again where one killed it."""
    child = attack.Child()
    yield child
    child.close()


@pytest.fixture
def campaign(whole: dict[str, Path], child: attack.Child, tmp_path: Path) -> attack.Campaign:
    """Copies of the bundles, to be damaged."""
    return attack.Campaign(whole, tmp_path, child)


def test_mutants_are_refused_or_used(campaign: attack.Campaign) -> None:
    counts = attack.attack(campaign, SEED, MUTANTS)
    print(f"\n{counts}")
    assert counts.failures == []
    assert (counts.crashes, counts.hangs, counts.tracebacks, counts.wrong) == (0, 0, 0, 0)
    assert counts.refused + counts.accepted == counts.cases == MUTANTS
    assert counts.refused > MUTANTS / 2
    assert counts.accepted > MUTANTS / 10


@pytest.mark.parametrize("name", attack.LAYOUTS)
def test_whole_files_go_every_way(campaign: attack.Campaign, tmp_path: Path, name: str) -> None:
    """So a refusal of the campaign is the mutant's, not the way's."""
    for way in {way for ways in attack.WAYS.values() for way in ways}:
        result = campaign.child.ask(way, tmp_path / name, full=name == "grouped")
        refused = way == "quantize" and name != "grouped"  # quantized already
        assert result.outcome == ("refused" if refused else "accepted"), (way, result)


def test_a_file_of_the_first_scripts_is_repaired_and_used(campaign: attack.Campaign, tmp_path: Path) -> None:
    file, folder = campaign.files[attack.MMPROJ][attack.HUB], tmp_path / "grouped"
    attack.put(folder, attack.MMPROJ, file.header() + file.data)
    assert campaign.child.ask("bundle", folder).outcome == "refused"
    assert campaign.child.ask("repair", folder, full=True).outcome == "accepted"


def test_the_child_survives_what_it_measures(campaign: attack.Campaign, tmp_path: Path) -> None:
    """A signal in a way in is a crash in the counts, and the next case goes on."""
    assert campaign.child.ask("abort", tmp_path / "grouped").fault == "crashes"
    assert campaign.child.ask("load", tmp_path / "grouped").outcome == "accepted"

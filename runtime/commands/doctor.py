"""`pocketllava doctor`: what is installed, what this machine offers, and whether answers are right here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from pocketllava.models.plan_text import size

if TYPE_CHECKING:
    from pocketllava.measure.health import Health

ILL = 1


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; sizes are in bytes.")
def doctor(as_json: bool) -> None:
    """Show versions, how llama.cpp was built, devices, memory and caches, and ask the demo model in a self-test.

    Takes about ten seconds. The exit code is 1 if the demo's answers are not the recorded ones. Paste it into a report
    of a problem.
    """
    from pocketllava.measure.health import health

    found = health()
    if as_json:
        click.echo(json.dumps({**asdict(found), "is_well": found.is_well}, ensure_ascii=False))
    else:
        click.echo("\n".join(lines(found)))
    if not found.is_well:
        click.get_current_context().exit(ILL)


def lines(found: Health) -> Iterator[str]:
    """One screen."""
    yield "versions   " + ", ".join(f"{name} {version}" for name, version in found.versions.items())
    if found.library_failure:
        yield (
            f"llama.cpp  does not run here ({found.library_failure}); install llama-cpp-python again, built on this"
            " machine (docs/devices.md)"
        )
    else:
        yield from _library(found)
    for folder in found.folders:
        yield f"{folder.purpose:<10} {folder.path}: {'none' if folder.n_bytes is None else size(folder.n_bytes)}"
    present = [f"{name} {'yes' if is_there else 'no'}" for name, is_there in sorted(found.extras.items())]
    yield "extras     " + ", ".join(present)
    yield "self-test  " + _self_test(found)


def _library(found: Health) -> Iterator[str]:
    facts = found.library
    yield f"llama.cpp  {facts['built']}"
    yield f"memory     {facts['cpu']}; {size(facts['free_bytes'])} free now"
    for name, left in facts["limits"]:
        yield f"           {name} leaves {size(max(0, left))}"
    for device in facts["devices"]:
        yield f"device     {device['name']}: {size(device['free'])} free of {size(device['total'])}"
    if not facts["devices"]:
        yield "device     none beside the CPU in this build of llama.cpp"


def _self_test(found: Health) -> str:
    test = found.self_test
    if not test.devices:
        return f"failed: the demo does not answer ({test.failure})"
    equal = f"{test.n_equal} of {test.n_questions} answers of the demo as recorded"
    where = f"{test.seconds:.1f} s, text: {test.devices[0]}, vision: {test.devices[1]}"
    return f"{equal} ({where})" + (f"; failed: {test.failure}" if test.failure else "")

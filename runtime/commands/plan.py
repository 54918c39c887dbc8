"""`pocketllava plan`: what loading a bundle takes on this machine, whether it fits, and what would make it fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pocketllava.commands.common import Place, setting_option
from pocketllava.types import LoadOptions

if TYPE_CHECKING:
    from pocketllava.models.plan import Plan

TOO_LARGE = 1


@click.command()
@click.argument("model", metavar="BUNDLE", type=Place())
@setting_option(LoadOptions, "n_ctx")
@setting_option(LoadOptions, "kv_type")
@setting_option(LoadOptions, "flash_attn")
@setting_option(LoadOptions, "n_gpu_layers")
@setting_option(LoadOptions, "main_gpu")
@setting_option(LoadOptions, "tensor_split")
@setting_option(LoadOptions, "mmproj_device")
@setting_option(LoadOptions, "exact")
@setting_option(LoadOptions, "n_threads")
@setting_option(LoadOptions, "weights")
@setting_option(LoadOptions, "image_tokens")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; sizes are in bytes.")
def plan(model: str, as_json: bool, **load: Any) -> None:
    """Show what loading takes, part by part, and whether it fits this machine. Loads nothing.

    Give it the options that you would give to `ask`. Where the model does not fit, the changes that would make it fit
    follow, the least harm first, and the exit code is 1.
    """
    from pocketllava import Llava

    planned = Llava.plan(model, **load)
    click.echo(json.dumps(fields(planned), ensure_ascii=False) if as_json else str(planned))
    if planned.verdict == "too large":
        click.get_current_context().exit(TOO_LARGE)


def fields(planned: Plan) -> dict[str, Any]:
    """A plan in JSON's types, with what follows from its fields."""
    values = asdict(planned)
    values["machine"]["rearranged"] = sorted(planned.machine.rearranged)
    room = planned.decisive
    return {
        **values,
        "total": planned.total,
        "verdict": planned.verdict,
        "margin": room.margin,
        "room": room.name,
    }

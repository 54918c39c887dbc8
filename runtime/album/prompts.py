"""What a run asks: a bundle, prompts and options -> the columns of an album. Knows what an answer depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pocketllava.album.journal import Question
from pocketllava.errors import InputError
from pocketllava.models import Bundle
from pocketllava.models.bundle import MMPROJ, MODEL
from pocketllava.models.files import read_text
from pocketllava.types import LoadOptions, Options

DEFAULT_PROMPT = "Describe the image."
MAX_PROMPTS = 100
LOAD = ("image_tokens", "kv_type", "flash_attn")  # what changes answers beside Options


def questions(
    bundle: Bundle, prompts: Sequence[str], options: Options, load: Mapping[str, Any]
) -> tuple[Question, ...]:
    """A column for each prompt."""
    given: dict[str, Any] = _changed(options, Options())
    loaded = LoadOptions(**load)
    given |= {
        f"load.{name}": value for name, value in _changed(loaded, LoadOptions()).items() if name in LOAD
    }
    files = bundle.manifest.files
    model = f"{files[MODEL].digest} {files[MMPROJ].digest}"
    name = bundle.folder.resolve().name
    return tuple(Question(prompt, prompt, given, name, model) for prompt in prompts)


def read_prompts(path: Path) -> list[str]:
    """A question a line; empty lines and those that begin with # are left out. Raises InputError."""
    try:
        lines = [line.strip() for line in read_text(path).split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read as a list of questions ({reason})") from error
    prompts = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InputError(f"{path}: found {len(prompts)} questions, expected 1 to {MAX_PROMPTS}, one a line")
    return prompts


def _changed(options: Any, default: Any) -> dict[str, Any]:
    """Fields that differ from the default, in JSON's types."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    changed = {name: value for name, value in values.items() if value != getattr(default, name)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}

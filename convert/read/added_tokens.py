"""Tokens added to a tokenizer after its training, from every file that may name them.

Knows tokenizer_config.json, tokenizer.json and added_tokens.json, and which of them transformers 5.24 reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AddedToken:
    """strip: the side on which the token swallows white space: "", "left", "right" or "both"."""

    text: str
    special: bool
    strip: str = ""


def added_tokens(files: Mapping[str, Any]) -> dict[int, AddedToken]:
    """By id. files: JSON content by file name.

    What tokenizer_config.json says of a token counts; added_tokens.json is read only where that file lists none.
    """
    added: dict[int, AddedToken] = {}
    decoder = files.get("tokenizer_config.json", {}).get("added_tokens_decoder", {})
    if not decoder:
        for text, token_id in files.get("added_tokens.json", {}).items():
            added[int(token_id)] = AddedToken(str(text), True)
    for entry in files.get("tokenizer.json", {}).get("added_tokens", []):
        added[int(entry["id"])] = _token(entry)
    return added | {int(token_id): _token(entry) for token_id, entry in decoder.items()}


def fitting(added: Mapping[int, AddedToken], n_rows: int) -> tuple[dict[int, AddedToken], tuple[str, ...]]:
    """(the tokens that have a row of the embedding, a remark on those that have none)."""
    beyond = {i: token.text for i, token in added.items() if not 0 <= i < n_rows}
    inside = {i: token for i, token in added.items() if i not in beyond}
    if not beyond:
        return inside, ()
    named = ", ".join(f"{text!r} ({i})" for i, text in sorted(beyond.items())[:3])
    return inside, (f"added tokens without a row among the embedding's {n_rows} are left out: {named}",)


def strip_sides(added: Mapping[int, AddedToken]) -> dict[str, str]:
    """The special tokens that swallow white space, and on which side."""
    return {token.text: token.strip for token in added.values() if token.special and token.strip}


def _token(entry: Mapping[str, Any]) -> AddedToken:
    sides = {(True, False): "left", (False, True): "right", (True, True): "both"}
    flags = entry.get("lstrip") is True, entry.get("rstrip") is True
    return AddedToken(str(entry["content"]), bool(entry.get("special")), sides.get(flags, ""))

"""tokenizer.json of a Llama-3 model -> the token arrays of a GGUF file (byte-level BPE).

Knows tokenizer.json's parts and llama.cpp's pre-tokenizers, matched by their regex rather than by hashes. A
tokenizer for which llama.cpp has no equivalent is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketllava.errors import ConvertError, UnsupportedCheckpoint

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.h, llama_token_type
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OTHERS = {LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "Qwen2's"}
WHOLE_WORDS, MERGES_ONLY = "llama-bpe", "smaug-bpe"  # one regex; only the first takes whole words unmerged
Added = Mapping[int, tuple[str, bool]]  # id -> (text, special)


@dataclass(frozen=True)
class ByteLevel:
    """A byte-level BPE vocabulary, one token a row of the embedding. Ids are None where none is named."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    bos_id: int | None
    eos_id: int | None
    add_bos: bool


def is_byte_level(described: Mapping[str, Any] | None) -> bool:
    """Whether tokenizer.json describes a BPE over bytes, not one with SentencePiece's byte fallback."""
    model = (described or {}).get("model") or {}
    return isinstance(model, Mapping) and model.get("type") == "BPE" and not model.get("byte_fallback")


def read_byte_level(
    described: Mapping[str, Any], config: Mapping[str, Any], added: Added, n_rows: int
) -> ByteLevel:
    """Build it for an embedding of n_rows rows. config: tokenizer_config.json.

    Raises UnsupportedCheckpoint for what llama.cpp would tokenize differently, ConvertError for damage.
    """
    model = described["model"]
    pre = _pre_tokenizer(described, bool(model.get("ignore_merges")))
    ids = _vocabulary(model)
    _expect_fits(ids, n_rows)
    tokens, types = [f"[PAD{i}]" for i in range(n_rows)], [UNUSED] * n_rows
    for text, i in ids.items():
        tokens[i], types[i] = text, NORMAL
    for i, (text, special) in added.items():
        tokens[i], types[i] = text, CONTROL if special or looks_special(text) else USER_DEFINED
    named = {text: i for i, text in enumerate(tokens)}
    bos, eos = (named.get(_text(config.get(f"{end}_token"))) for end in ("bos", "eos"))
    begins = bos is not None and adds_bos(described, tokens[bos])
    return ByteLevel(tokens, types, _merges(model, ids), pre, bos, eos, begins)


def _pre_tokenizer(described: Mapping[str, Any], whole_words: bool) -> str:
    """llama.cpp's name for the way this tokenizer.json splits text."""
    if normalizer := described.get("normalizer"):
        raise UnsupportedCheckpoint(
            f"tokenizer.json: normalizer {_kind(normalizer)}, expected none (Llama 3 has none)"
        )
    split = described.get("pre_tokenizer")
    steps = _steps(split, "pretokenizers")
    kinds = [_kind(step) for step in steps]
    if kinds != ["Split", "ByteLevel"]:
        raise UnsupportedCheckpoint(
            f"tokenizer.json: pre-tokenizer {' + '.join(kinds) or 'none'}, expected Llama 3's (Split + ByteLevel)"
        )
    pattern = steps[0].get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if regex != LLAMA3:
        whose = OTHERS.get(str(regex), "unknown")
        raise UnsupportedCheckpoint(
            f"tokenizer.json: {whose} pre-tokenizer regex {str(regex)[:80]!r}, expected Llama 3's {LLAMA3[:30]!r}..."
        )
    plain = (steps[0].get("behavior"), bool(steps[0].get("invert")))
    bytes_only = (bool(steps[1].get("add_prefix_space")), bool(steps[1].get("use_regex", True)))
    if plain != ("Isolated", False) or bytes_only != (False, False):
        raise UnsupportedCheckpoint(
            f"tokenizer.json: Split {plain} and ByteLevel (add_prefix_space, use_regex) {bytes_only}, expected"
            " ('Isolated', False) and (False, False) as Llama 3 has them"
        )
    return WHOLE_WORDS if whole_words else MERGES_ONLY


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UnsupportedCheckpoint(f"tokenizer.json: {name} {model[name]!r}, expected none")
    ids = model.get("vocab")
    if not isinstance(ids, dict) or not ids or any(type(i) is not int for i in ids.values()):
        raise ConvertError("tokenizer.json: no vocabulary of texts and ids; download it again")
    if len(set(ids.values())) != len(ids) or min(ids.values()) < 0:
        raise ConvertError("tokenizer.json: its vocabulary's ids repeat or are negative; download it again")
    return ids


def _merges(model: Mapping[str, Any], ids: Mapping[str, int]) -> list[str]:
    """ "left right" lines, from either form in which tokenizer.json writes a pair."""
    lines: list[str] = []
    merges = model.get("merges")
    for pair in merges if isinstance(merges, list) else []:
        parts = pair.split(" ") if isinstance(pair, str) else pair
        valid = isinstance(parts, list) and len(parts) == 2 and all(isinstance(p, str) for p in parts)
        if not valid or any(text not in ids for text in (*parts, "".join(parts))):
            raise ConvertError(f"tokenizer.json: merge {pair!r} is not of its vocabulary; download it again")
        lines.append(" ".join(parts))
    if not lines:
        raise ConvertError("tokenizer.json: no merges, expected those of a byte-level BPE; download it again")
    return lines


def _expect_fits(ids: Mapping[str, int], n_rows: int) -> None:
    if max(ids.values()) >= n_rows:
        raise ConvertError(
            f"tokenizer: token id {max(ids.values())}, but the embedding has {n_rows} rows; expected one a token"
        )


def adds_bos(described: Mapping[str, Any], bos: str) -> bool:
    """Whether tokenizer.json's post-processor puts the beginning-of-sequence token before a text."""
    for step in _steps(described.get("post_processor"), "processors"):
        single = step.get("single") if isinstance(step, dict) else None
        first = single[0] if isinstance(single, list) and single else {}
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(special, dict) and special.get("id") == bos:
            return True
    return False


def looks_special(text: str) -> bool:
    """As llama.cpp's converter guesses (conversion/base.py, does_token_look_special)."""
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or (
        text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>"))
    )


def _steps(part: Any, name: str) -> list[Any]:
    """The steps of a Sequence, or the one step that stands alone."""
    steps = part.get(name, [part]) if isinstance(part, dict) else []
    return steps if isinstance(steps, list) else []


def _kind(step: Any) -> str:
    return str(step.get("type")) if isinstance(step, dict) else repr(step)


def _text(token: Any) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)

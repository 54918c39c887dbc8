"""tokenizer.model / tokenizer.json -> the token arrays of a GGUF file (SentencePiece-style BPE).

Knows the two files and GGUF's token types; no tensors. Llama 3's kind is in vocab_bpe.py. A checkpoint's vocabulary
is padded to the embedding's rows, because llama.cpp expects one token for each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pocketllava.convert.read.added_tokens import AddedToken, added_tokens, fitting, strip_sides
from pocketllava.convert.read.checkpoint import Checkpoint
from pocketllava.convert.read.sources import LFS, read_bytes
from pocketllava.convert.read.vocab_bpe import adds_bos, is_byte_level, looks_special, read_byte_level
from pocketllava.errors import ConvertError, UnsupportedCheckpoint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.h, llama_token_type
MAX_MODEL_BYTES = 64 << 20  # of tokenizer.model; the largest has 5 MB
SPACE = "▁"
NORMALIZER, ADD_DUMMY_PREFIX = 3, 3  # fields of sentencepiece_model.proto: ModelProto's, NormalizerSpec's
FIRST_SCORED_ID = 259  # <unk>, <s>, </s> and 256 bytes come first; a piece's score is 259 - id
MERGES_ONLY_SCORE = -1e9  # pieces of "▁" alone, in llama-2's tokenizer.model
ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0  # as llama.cpp's converter writes them


@dataclass(frozen=True)
class Vocab:
    """Token arrays of equal length, special ids, and which text pieces get a leading space.

    space_prefix: see models/manifest.py; "every" for the hub's llava-1.5, "chunk" for the original format.
    merges: of a byte-level BPE (Llama 3), which has no scores; pre is llama.cpp's name of its pre-tokenizer.
    strip: special tokens that swallow white space beside them, and on which side ("left", "right" or "both").
    dummy_prefix: whether tokenizer.model itself puts a space before a text.
    """

    tokens: list[str]
    scores: list[float]
    types: list[int]
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int | None
    add_bos: bool
    space_prefix: str
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    strip: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    dummy_prefix: bool = True


def read_vocab(checkpoint: Checkpoint, n_rows: int, bos_id: int, eos_id: int) -> Vocab:
    """Build the vocabulary for an embedding of n_rows rows. Raises ConvertError, UnsupportedCheckpoint."""
    described = checkpoint.files.get("tokenizer.json")
    model = checkpoint.folder / "tokenizer.model"
    added, remarks = fitting(added_tokens(checkpoint.files), n_rows)
    if described is not None and is_byte_level(described):
        vocab = _from_byte_level(checkpoint, described, added, n_rows, bos_id, eos_id)
        return replace(vocab, strip=strip_sides(added), remarks=remarks)
    if model.is_file():
        vocab = read_sentencepiece(model)
    elif described is not None:
        vocab = _from_tokenizer_json(described)
    else:
        raise ConvertError(f"{checkpoint.folder}: no tokenizer.model and no tokenizer.json, expected either")
    config = checkpoint.files.get("tokenizer_config.json", {})
    vocab = replace(
        vocab,
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=_adds_bos(described, config, vocab.tokens, bos_id),
        space_prefix=_space_prefix(described, config),
        strip=strip_sides(added),
    )
    _extend(vocab, added, n_rows)
    if described is None and "add_bos_token" not in config:
        remarks += (
            "tokenizer_config.json: no add_bos_token, so prompts begin without one, as transformers 5 has it",
        )
    return replace(vocab, pad_id=_pad_id(added, config), remarks=remarks)


def with_image_token(vocab: Vocab, image_token_id: int) -> Vocab:
    """The vocabulary with the image token as a special one: users' words must never stand for an image.

    Raises ConvertError where config.json's id is no token's.
    """
    if image_token_id >= len(vocab.tokens) or vocab.types[image_token_id] == UNUSED:
        raise ConvertError(
            f"config.json: image_token_index {image_token_id}, which the tokenizer's files do not name; expected the"
            " image token's id"
        )
    types = list(vocab.types)
    types[image_token_id] = CONTROL
    return replace(vocab, types=types)


def _pad_id(added: dict[int, AddedToken], config: dict[str, Any]) -> int | None:
    return {token.text: i for i, token in added.items()}.get(str(_text(config.get("pad_token"))))


def _adds_bos(
    described: dict[str, Any] | None, config: dict[str, Any], tokens: list[str], bos_id: int
) -> bool:
    """tokenizer.json's post-processor decides, whatever tokenizer_config.json says; without it the latter does."""
    if described is None:
        return config.get("add_bos_token") is True
    return bos_id < len(tokens) and adds_bos(described, tokens[bos_id])


def _from_byte_level(
    checkpoint: Checkpoint,
    described: dict[str, Any],
    added: dict[int, AddedToken],
    n_rows: int,
    bos_id: int,
    eos_id: int,
) -> Vocab:
    """Llama 3's kind: bos and eos are those of the tokenizer's files, or else config.json's."""
    config = checkpoint.files.get("tokenizer_config.json", {})
    b = read_byte_level(described, config, {i: (t.text, t.special) for i, t in added.items()}, n_rows)
    pad = _pad_id(added, config)
    bos = bos_id if b.bos_id is None else b.bos_id
    eos = eos_id if b.eos_id is None else b.eos_id
    return Vocab(b.tokens, [], b.types, bos, eos, -1, pad, b.add_bos, "none", b.merges, b.pre)


def read_sentencepiece(path: Path) -> Vocab:
    """The pieces of a tokenizer.model, before added tokens. Raises ConvertError."""
    data = read_bytes(path, MAX_MODEL_BYTES)
    if data.startswith(LFS):
        raise ConvertError(f"{path}: a git-lfs pointer, not the file; run `git lfs pull` or download it")
    tokens, scores, types = [], [], []
    dummy_prefix = True  # SentencePiece's default
    try:
        for field, value in _fields(data):
            if field == NORMALIZER and isinstance(value, bytes):
                dummy_prefix = bool(dict(_fields(value)).get(ADD_DUMMY_PREFIX, True))
            if field == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                tokens.append(_utf8(piece.get(1, b"")))
                scores.append(_float(piece.get(2, b"\0\0\0\0")))
                types.append(int(piece.get(3, NORMAL)))
    except (IndexError, ValueError, TypeError) as error:
        raise ConvertError(f"{path}: not a SentencePiece model ({error}); download it again") from error
    if not tokens or any(not NORMAL <= kind <= BYTE for kind in types):
        raise ConvertError(f"{path}: {len(tokens)} pieces, expected a SentencePiece vocabulary")
    types = [
        CONTROL if kind == USER_DEFINED and looks_special(text) else kind
        for text, kind in zip(tokens, types, strict=True)
    ]
    return replace(_vocab(tokens, scores, types), dummy_prefix=dummy_prefix)


def _from_tokenizer_json(data: dict[str, Any]) -> Vocab:
    model = data.get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise UnsupportedCheckpoint(
            f"tokenizer.json: {model.get('type')!r} with byte_fallback {model.get('byte_fallback')!r}, expected"
            " a SentencePiece-style BPE with byte fallback"
        )
    ids = model.get("vocab")
    if not isinstance(ids, dict) or sorted(ids.values()) != list(range(len(ids))):
        raise ConvertError("tokenizer.json: its vocabulary's ids are not 0, 1, 2, ...; download it again")
    tokens = sorted(ids, key=lambda text: int(ids[text]))
    special = {t["content"] for t in data.get("added_tokens", []) if t.get("special")}
    types = [_type_of(text, special, str(model.get("unk_token"))) for text in tokens]
    scores = [_score_of(i, text) for i, text in enumerate(tokens)]
    return _vocab(tokens, scores, types)


def _vocab(tokens: list[str], scores: list[float], types: list[int]) -> Vocab:
    unk = types.index(UNKNOWN) if UNKNOWN in types else 0
    return Vocab(tokens, scores, types, 1, 2, unk, None, True, "every")


def _type_of(text: str, special: set[str], unk: str) -> int:
    if text == unk:
        return UNKNOWN
    if text in special:
        return CONTROL
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _score_of(token_id: int, text: str) -> float:
    """The score that llama-2's tokenizer.model gives; checked equal for all its 32,000 pieces."""
    if token_id < FIRST_SCORED_ID:
        return 0.0
    return MERGES_ONLY_SCORE if not text.strip(SPACE) else float(FIRST_SCORED_ID - token_id)


def _space_prefix(described: dict[str, Any] | None, config: dict[str, Any]) -> str:
    """Whether tokenizer.json puts "▁" before text: by a Prepend normalizer or a Metaspace pre-tokenizer.

    tokenizer.model alone: before every run, with legacy=false before the first only, as transformers 5.24 converts it.
    """
    if described is None:
        return "first" if config.get("legacy") is False else "every"
    for step in _steps(described.get("normalizer")):
        if step.get("type") == "Prepend":
            return "every"
    for step in _steps(described.get("pre_tokenizer")):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            return {"always": "every", "first": "first"}.get(scheme, "none")
    return "none"


def _steps(part: Any) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        return []
    return [s for key in ("normalizers", "pretokenizers") for s in part.get(key, [])] or [part]


def _extend(vocab: Vocab, added: dict[int, AddedToken], n_rows: int) -> None:
    """Put added tokens in and pad to the embedding's rows, in place."""
    if len(vocab.tokens) > n_rows:
        raise ConvertError(
            f"tokenizer: token id {len(vocab.tokens) - 1}, but the embedding has {n_rows} rows; expected one a token"
        )
    for i in range(len(vocab.tokens), n_rows):
        vocab.tokens.append(f"[PAD{i}]")
        vocab.scores.append(PADDING_SCORE)
        vocab.types.append(UNUSED)
    for i, token in added.items():
        if vocab.types[i] == UNKNOWN:
            continue
        vocab.tokens[i] = token.text if token.special else token.text.replace(SPACE, " ")
        vocab.scores[i] = ADDED_SCORE
        vocab.types[i] = CONTROL if token.special or looks_special(token.text) else USER_DEFINED


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _utf8(value: int | bytes) -> str:
    if not isinstance(value, bytes):
        raise ValueError("a piece is not text")
    return value.decode("utf-8")


def _float(value: int | bytes) -> float:
    import struct

    if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError("a score is not a float")
    return float(struct.unpack("<f", value)[0])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: varints as int, everything else as bytes.

    Wire format: https://protobuf.dev/programming-guides/encoding
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield field, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + length > len(data):
            raise ValueError(f"ends inside a field at byte {at}")
        yield field, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number too long at byte {at}")

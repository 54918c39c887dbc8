"""A SentencePiece-style byte-fallback BPE of about 900 pieces, as tokenizer.model and tokenizer.json.

Trained by plain pair counting on the text below, every time the same; both files describe one vocabulary,
in llama-2's layout: <unk>, <s>, </s>, 256 bytes, learned pieces, single characters.
"""

from __future__ import annotations

import functools
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

SPACE = "▁"
N_MERGES = 500
CHATML = (  # the first pieces of Yi's vocabulary
    "<unk>", "<|startoftext|>", "<|endoftext|>", "<|Human|>", "<|Assistant|>", "<|System|>", "<|im_start|>",
    "<|im_end|>", "<|im_sep|>",
)  # fmt: skip
IM_END = CHATML.index("<|im_end|>")
CORPUS = """
USER: What is shown in the image? ASSISTANT: The image shows a red circle and a blue square on a white background.
USER: How many objects are there? ASSISTANT: There are three objects in the picture. Describe the image in detail.
A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed,
and polite answers to the human's questions. def main(argument): return argument + 1 for value in range(10):
print(value) if value > 3 else None import numpy as np # comment The quick brown fox jumps over the lazy dog.
Was ist auf dem Bild zu sehen? Qu'est-ce que c'est? ¿Qué hay en la imagen? left right above below between
small large green yellow purple orange triangle star hexagon digit one two three four five yes no there is not
"""


@functools.lru_cache(maxsize=1)
def pieces() -> tuple[list[str], list[str]]:
    """(learned pieces in order of learning, single characters in order of frequency)."""
    words = Counter(SPACE + w for w in CORPUS.split())
    words.update({SPACE * n: 3 for n in (2, 3, 4)})
    split = {w: list(w) for w in words}
    characters = Counter(c for w, n in words.items() for c in w * n)
    learned: list[str] = []
    while len(learned) < N_MERGES:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in zip(split[word], split[word][1:], strict=False):
                pairs[pair] += n
        if not pairs:
            break
        a, b = max(pairs, key=lambda p: (pairs[p], p))
        if a + b not in learned:
            learned.append(a + b)
        split = {w: _merge(s, a, b) for w, s in split.items()}
    order = sorted(characters, key=lambda c: (-characters[c], c))
    return learned, order + [
        c for c in "0123456789abcdefghijklmnopqrstuvwxyzé\t{}[]<>=/*" if c not in characters
    ]


def vocabulary(chatml: bool = False) -> list[str]:
    """All pieces by id."""
    learned, characters = pieces()
    first = CHATML if chatml else ("<unk>", "<s>", "</s>")
    return [*first, *(f"<0x{i:02X}>" for i in range(256)), *learned, *characters]


def write(
    folder: Path,
    *,
    model: bool = True,
    described: bool = True,
    scheme: str = "prepend",
    added: bool = True,
    chatml: bool = False,
) -> None:
    """Write tokenizer.model and/or tokenizer.json, and the small files beside them.

    added=False: tokenizer.model and what vicuna's tokenizer has beside it, no <image>, no <pad>.
    scheme: "prepend" as the hub's llava-1.5 has it, or a Metaspace's prepend_scheme ("first", "always").
    chatml: Yi's special pieces; its tokenizer.model puts no space before a text.
    """
    tokens = vocabulary(chatml)
    n = len(tokens)
    bos, eos = ("<|startoftext|>", "<|im_end|>") if chatml else ("<s>", "</s>")
    if model:
        (folder / "tokenizer.model").write_bytes(_sentencepiece(tokens, chatml))
    names = {"bos_token": bos, "eos_token": eos, "unk_token": "<unk>", "pad_token": "<unk>"}
    if not added:
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": not chatml,
            "add_eos_token": False,
            "legacy": chatml,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config | names))
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
        return
    if described:
        (folder / "tokenizer.json").write_text(json.dumps(_described(tokens, scheme, chatml)))
    special = names | {"pad_token": "<pad>"}
    decoder = {str(i): text for i, text in _special(tokens, chatml)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if scheme != "prepend" else "LlamaTokenizer",
        "processor_class": "LlavaProcessor",
        "add_bos_token": not chatml,
        "add_eos_token": False,
        "added_tokens_decoder": {i: _added(t) for i, t in decoder.items()},
        "padding_side": "left",
        "model_max_length": 4096,
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": n, "<pad>": n + 1}))


def _special(tokens: list[str], chatml: bool) -> list[tuple[int, str]]:
    """Special tokens, <image> and <pad> behind the vocabulary."""
    n, first = len(tokens), len(CHATML) if chatml else 3
    return [*enumerate(tokens[:first]), (n, "<image>"), (n + 1, "<pad>")]


def _added(text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, "special": True, **flags}


def _described(tokens: list[str], scheme: str, chatml: bool) -> dict[str, Any]:
    ids = {t: i for i, t in enumerate(tokens)}
    special = _special(tokens, chatml)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_added(t)} for i, t in special],
        "normalizer": prepend if scheme == "prepend" else None,
        "pre_tokenizer": None if scheme == "prepend" else metaspace,
        "post_processor": None
        if chatml
        else {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": _merges(tokens, ids),
        },
    }


def _merges(tokens: list[str], ids: dict[str, int]) -> list[list[str]]:
    """Every way to join two pieces into a third, by falling score of the third, as SentencePiece joins."""
    learned = sorted(pieces()[0], key=lambda piece: not piece.strip(SPACE))  # runs of spaces score last
    return [
        [piece[:at], piece[at:]]
        for piece in learned
        for at in sorted(range(1, len(piece)), key=lambda a, p=piece: (ids.get(p[:a], 0), ids.get(p[a:], 0)))
        if piece[:at] in ids and piece[at:] in ids
    ]


def _sentencepiece(tokens: list[str], chatml: bool) -> bytes:
    out, first = b"", len(CHATML) if chatml else 3
    for i, text in enumerate(tokens):
        kind = 2 if i == 0 else (4 if chatml and i > 2 else 3) if i < first else 6 if i < first + 256 else 1
        score = 0.0 if i < first + 256 else -1e9 if not text.strip(SPACE) else first + 256.0 - i
        data = text.encode()
        piece = (
            b"\x0a" + _varint(len(data)) + data + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        )
        out += b"\x0a" + _varint(len(piece)) + piece
    trainer = b"\x18\x02" + _varint(35 << 3) + b"\x01"  # model_type BPE, byte_fallback
    normalizer = (
        b"\x0a\x08identity" + (b"\x18\x00" if chatml else b"\x18\x01") + b"\x20\x00\x28\x01"
    )  # dummy prefix, keep spaces, escape them
    return out + b"\x12" + _varint(len(trainer)) + trainer + b"\x1a" + _varint(len(normalizer)) + normalizer


def _varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def _merge(symbols: list[str], a: str, b: str) -> list[str]:
    out: list[str] = []
    for s in symbols:
        if out and out[-1] == a and s == b:
            out[-1] = a + b
        else:
            out.append(s)
    return out

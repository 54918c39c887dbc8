"""The demo checkpoint's tokenizer and small files, in the form of llava-hf/llava-1.5-7b-hf; knows nothing of training.

One SentencePiece BPE with byte fallback is written twice, as tokenizer.model and as tokenizer.json.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from pocketllava.models.demo import scenes

PIECES = 576  # <unk> <s> </s>, 256 bytes, the rest learned; then <image> and <pad>
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
IMAGE_ID, PAD_ID = PIECES, PIECES + 1
PATCH = 56  # pixels; (336 // 56) ** 2 = 36 patches
CHAT_TEMPLATE = (  # says what llava-1.5's processor template says
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def corpus(n: int) -> Iterator[str]:
    """Lines to learn pieces from; the quotation mark stands for the newline before a first question."""
    for seed in scenes.TRAIN_SEEDS[:n]:
        for qa in scenes.questions(scenes.scene(seed)):
            for turn in qa.turns:
                yield f'USER: "{turn.question} ASSISTANT: {turn.answer} USER: {turn.question} ASSISTANT:'


def train_pieces(lines: Iterable[str]) -> bytes:
    """tokenizer.model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=PIECES, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, character_coverage=1.0,
        allow_whitespace_only_pieces=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def _merges(pieces: dict[str, int]) -> list[list[str]]:
    """Every pair that makes a piece, in the order of the pieces, as SentencePiece merges them."""
    found = []
    for piece, rank in pieces.items():
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        found += [(rank, pieces[a], pieces[b], [a, b]) for a, b in pairs if a in pieces and b in pieces]
    return [pair for *_, pair in sorted(found, key=lambda row: row[:3])]


def _added(ident: int, text: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": ident, "content": text, **flags}


SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", IMAGE_ID: IMAGE_TOKEN, PAD_ID: PAD_TOKEN}


def tokenizer_json(model: bytes) -> dict[str, Any]:
    """tokenizer.json for the same pieces, as the hub's llava-1.5 has it."""
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = {spm.id_to_piece(k): k for k in range(spm.get_piece_size())}
    learned = {p: k for p, k in pieces.items() if k >= 259}
    start, bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    second = [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    first = [start, {"Sequence": {"id": "A", "type_id": 0}}]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    ending = [
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [_added(k, text) for k, text in SPECIAL.items()],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": {"<s>": bos},
        },
        "decoder": {"type": "Sequence", "decoders": [back, *ending]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": pieces, "merges": _merges(learned),
        },
    }  # fmt: skip


def small_files() -> dict[str, dict[str, Any]]:
    """Every JSON file beside config.json, generation_config.json and the tokenizer."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": PAD_TOKEN}
    decoder = {str(k): {n: v for n, v in _added(k, t).items() if n != "id"} for k, t in SPECIAL.items()}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
            "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": 336}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": 336, "width": 336},
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "patch_size": PATCH,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer", "processor_class": "LlavaProcessor", "add_bos_token": True,
            "add_eos_token": False, "added_tokens_decoder": decoder, "padding_side": "left", "model_max_length": 2048,
            **special,
        },
        "special_tokens_map.json": special,
        "added_tokens.json": {IMAGE_TOKEN: IMAGE_ID, PAD_TOKEN: PAD_ID},
    }  # fmt: skip


def write(folder: Path) -> None:
    """The tokenizer in both forms and the small files; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    model = train_pieces(corpus(3_000))
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer_json(model), ensure_ascii=False), encoding="utf-8"
    )
    for name, value in small_files().items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

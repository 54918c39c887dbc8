"""A small vocabulary of Llama 3's kind: byte-level BPE, its true pre-tokenizer regex, its special tokens.

`llama3_tokenizer.json` was trained once by `train()` with the `tokenizers` library from the lines of
mixed_text.py. Ten words are in its vocabulary without their last merge, as Llama 3's has such: only
`ignore_merges` finds them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "recorded" / "llama3_tokenizer.json"
N_PIECES = 900
SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|reserved_special_token_0|>", "<image>", "<pad>",
)  # fmt: skip
REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>"
    "\n\n' }}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def described() -> dict[str, Any]:
    """tokenizer.json's content."""
    return dict(json.loads(FILE.read_text("utf-8")))


def id_of(text: str) -> int:
    """A special token's id."""
    return next(int(t["id"]) for t in described()["added_tokens"] if t["content"] == text)


def image_token() -> int:
    """<image>; <pad> is the next."""
    return id_of("<image>")


def ends() -> dict[str, int]:
    """text_config's ids."""
    return {"bos_token_id": id_of("<|begin_of_text|>"), "eos_token_id": id_of("<|end_of_text|>")}


def generation_ends() -> dict[str, Any]:
    """generation_config.json's ids: two end an answer."""
    return {**ends(), "eos_token_id": [id_of("<|end_of_text|>"), id_of("<|eot_id|>")]}


def write(folder: Path, added: bool = True) -> None:
    """tokenizer.json and tokenizer_config.json, and no tokenizer.model. added=False: no <image>, no <pad>."""
    data = described()
    if not added:
        data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in ("<image>", "<pad>")]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        **({"pad_token": "<pad>"} if added else {}),
        "added_tokens_decoder": {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in data["added_tokens"]
        },
        "clean_up_tokenization_spaces": True,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def train() -> None:
    """Train it anew and write FILE (needs the `tokenizers` library)."""
    import mixed_text
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(REGEX), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=N_PIECES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(mixed_text.lines(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    bos = SPECIAL[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, N_PIECES)]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), template]  # type: ignore[list-item]
    )
    data = json.loads(tokenizer.to_str())
    merges, used = data["model"]["merges"], {p for pair in data["model"]["merges"] for p in pair}
    words = [p for p in merges if p[0] + p[1] not in used and len(p[0] + p[1]) > 4 and p[0].startswith("Ġ")]
    data["model"]["merges"] = [p for p in merges if p not in words[:10]]
    FILE.write_text(json.dumps(data, ensure_ascii=False, indent=0) + "\n", "utf-8")


if __name__ == "__main__":
    train()

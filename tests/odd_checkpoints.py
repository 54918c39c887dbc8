"""Checkpoints that transformers loads although a file is odd: what was done to each, for tests with and without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import small_checkpoint
from small_checkpoint import CHAT_TEMPLATE, dump, to_bytes, write_safetensors

FILE = Path(__file__).parent / "recorded" / "odd_checkpoints.json"
LAYOUT: dict[str, Any] = {"layers": 1, "vision_layers": 2, "seed": 21}
PROMPTS = (
    "image", "two images", "empty text", "leading space", "leading spaces", "trailing spaces", "line breaks",
    "leading line break", "chinese", "two turns", "images in two turns", "system",
)  # fmt: skip
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
INV_FREQ = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
Change = Callable[[Path], None]
Tensor = tuple[str, str, tuple[int, ...], bytes]


def edited(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    """Edit one JSON file in place."""

    def edit(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        dump(folder / name, data)

    return edit


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def without(name: str) -> Change:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def tensors() -> list[Tensor]:
    """The layout's tensors."""
    return [
        (n, "F16", a.shape, to_bytes(a, "F16"))
        for n, a in small_checkpoint.values(small_checkpoint.Layout(**LAYOUT))
    ]


def halved(tensor: Tensor) -> Tensor:
    """Another tensor of that name: half of it."""
    values = np.frombuffer(tensor[3], np.float16) * np.float16(0.5)
    return (*tensor[:3], values.tobytes())


def sharded(
    folder: Path, first: list[Tensor], second: list[Tensor], index: dict[str, int], *, whole: bool = False
) -> None:
    """Two shards and an index that names the shard of each tensor; `whole` keeps model.safetensors beside them."""
    names = {n: f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)}
    for n, group in ((1, first), (2, second)):
        write_safetensors(folder / names[n], group)
    weight_map = {name: names[n] for name, n in index.items()}
    dump(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    if not whole:
        (folder / "model.safetensors").unlink()


def index_of(first: list[Tensor], second: list[Tensor]) -> dict[str, int]:
    """The honest index."""
    return {t[0]: 1 for t in first} | {t[0]: 2 for t in second}


def halves() -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of two shards."""
    every = tensors()
    return every[: len(every) // 2], every[len(every) // 2 :]


def stale_shards(folder: Path) -> None:
    """model.safetensors beside the shards of an older training step."""
    first, second = halves()
    sharded(folder, list(map(halved, first)), list(map(halved, second)), index_of(first, second), whole=True)


def lost_shards(folder: Path) -> None:
    """model.safetensors beside an index whose shards are gone."""
    stale_shards(folder)
    for path in folder.glob("model-*"):
        path.unlink()


def duplicates(folder: Path) -> None:
    """The first shard repeats tensors of the second, with older values."""
    first, second = halves()
    sharded(folder, [*first, *map(halved, second[:3])], second, index_of(first, second))


def frequencies_in_index(folder: Path) -> None:
    """An index that names what older transformers stored, though no shard holds it."""
    first, second = halves()
    sharded(folder, first, second, {**index_of(first, second), INV_FREQ: 1})


def unindexed(folder: Path) -> None:
    """Two tensors that the index does not name: one that the model needs, one that it does not know."""
    first, second = halves()
    index = index_of(first, second)
    del index[HEAD]
    sharded(folder, [*first, ("optimizer.step", "F16", (2,), bytes(4))], second, index)


def head_only(folder: Path) -> None:
    """Tied, and only the head is stored."""
    write_safetensors(folder / "model.safetensors", [t for t in tensors() if t[0] != EMBEDDING])
    tie(folder, top=True)


def tie(folder: Path, *, top: bool) -> None:
    """tie_word_embeddings at one level of config.json."""

    def change(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = top
        config["text_config"]["tie_word_embeddings"] = not top

    edited("config.json", change)(folder)


SHORT = CHAT_TEMPLATE.replace("'ASSISTANT:'", "'ASSISTANT: In short:'")
LONG = CHAT_TEMPLATE.replace("'ASSISTANT:'", "'ASSISTANT: At length:'")
DATED = "{{ strftime_now('%%') }}{{ pad_token }}{{ unk_token }}" + CHAT_TEMPLATE
NAMED_BOS = "{{ bos_token }}" + CHAT_TEMPLATE


def chat(template: Any, file: str = "chat_template.json") -> Change:
    """Put a template into a file, beside what is there."""

    def change(folder: Path) -> None:
        if file.endswith(".jinja"):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(template)
            return
        data = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        dump(folder / file, {**data, "chat_template": template})

    return change


def flags(**changes: bool) -> Change:
    """Change <image>'s flags in both of the tokenizer's files."""

    def in_config(config: dict[str, Any]) -> None:
        for entry in config["added_tokens_decoder"].values():
            entry.update(changes if entry["content"] == "<image>" else {})

    def in_tokenizer(data: dict[str, Any]) -> None:
        for entry in data["added_tokens"]:
            entry.update(changes if entry["content"] == "<image>" else {})

    return both(edited("tokenizer_config.json", in_config), edited("tokenizer.json", in_tokenizer))


def one_more(folder: Path) -> None:
    """An added token for which the embedding has no row."""
    row = small_checkpoint.Layout(**LAYOUT).vocab
    edited("tokenizer_config.json", lambda c: c["added_tokens_decoder"].update(
        {str(row): {**c["added_tokens_decoder"]["2"], "content": "<extra>"}}))(folder)  # fmt: skip
    edited("tokenizer.json", lambda d: d["added_tokens"].append(
        {**d["added_tokens"][-1], "id": row, "content": "<extra>"}))(folder)  # fmt: skip


def config(**changes: Any) -> Change:
    """Change tokenizer_config.json."""
    return edited("tokenizer_config.json", lambda data: data.update(changes))


def pre_tokenizer(scheme: str) -> Change:
    """A Metaspace instead of the Prepend normalizer."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return edited("tokenizer.json", lambda data: data.update(normalizer=None, pre_tokenizer=metaspace))


TENSORS: dict[str, Change] = {
    "a whole file beside older shards": stale_shards,
    "a whole file beside lost shards": lost_shards,
    "tensors in two shards": duplicates,
    "rotary frequencies in the index": frequencies_in_index,
    "tensors outside the index": unindexed,
    "tied above, another head": lambda folder: tie(folder, top=True),
    "tied below, another head": lambda folder: tie(folder, top=False),
    "tied, the head alone": head_only,
}
TOKENS: dict[str, Change] = {
    "chat_template.json beside .jinja": both(chat(SHORT), chat(LONG, "chat_template.jinja")),
    "processor_config.json's template": both(chat(LONG), chat(SHORT, "processor_config.json")),
    "several templates by name": chat({"default": SHORT, "rag": "x"}),
    "an additional default template": both(
        without("chat_template.json"), chat(SHORT, "additional_chat_templates/default.jinja")
    ),
    "names that templates know": chat(DATED),
    "a template that writes <s>": chat(NAMED_BOS),
    "<s> and prepend_scheme first": both(chat(NAMED_BOS), pre_tokenizer("first"), without("tokenizer.model")),
    "tokenizer.model alone": without("tokenizer.json"),
    "tokenizer.model alone, legacy": both(without("tokenizer.json"), config(legacy=True)),
    "tokenizer.model alone, not legacy": both(without("tokenizer.json"), config(legacy=False)),
    "tokenizer.model alone, no add_bos_token": both(
        without("tokenizer.json"), edited("tokenizer_config.json", lambda data: data.pop("add_bos_token"))
    ),
    "add_bos_token false beside tokenizer.json": config(add_bos_token=False),
    "legacy false beside tokenizer.json": config(legacy=False),
    "lstrip": flags(lstrip=True),
    "rstrip": flags(rstrip=True),
    "lstrip and rstrip": flags(lstrip=True, rstrip=True),
    "an added token beyond the embedding": one_more,
}


def write(folder: Path, name: str) -> Path:
    """Write one of them."""
    small_checkpoint.write(folder, **LAYOUT)
    (TENSORS | TOKENS)[name](folder)
    return folder


def load() -> dict[str, Any]:
    """What transformers gave, recorded with versions."""
    return dict(json.loads(FILE.read_text("utf-8"))) if FILE.exists() else {}


def keep(name: str, value: Any) -> None:
    """Write one part of the recording."""
    FILE.write_text(json.dumps({**load(), name: value}, indent=0, ensure_ascii=False) + "\n", "utf-8")

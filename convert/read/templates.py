"""A bundle's chat template and end-of-sequence ids, from all the files that may define them.

Knows JSON content and the vocabulary; renders nothing.
"""

from __future__ import annotations

import re
from typing import Any

from pocketllava.convert.read.checkpoint import Checkpoint
from pocketllava.convert.read.config import LlavaConfig
from pocketllava.convert.read.original import conversation
from pocketllava.convert.read.vocab import Vocab
from pocketllava.errors import ConvertError
from pocketllava.models.bundle import DEFAULT_TEMPLATE
from pocketllava.models.manifest import IMAGE_TOKEN

END, WRONG_END = "</s>", re.compile(r"<\\{1,2}s>")  # a backslash, or one escaped in a string of the template
LLAMA3_HEADER = "<|start_header_id|>"
# Meta's Llama-3 template with llava-llama-3-8b's place for images; for checkpoints whose own knows no images.
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] | trim }}"
    "{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def chat_template(checkpoint: Checkpoint, vocab: Vocab, image_token_id: int) -> str:
    """The checkpoint's chat template if it knows images, otherwise the one of its family."""
    own = checkpoint.chat_template
    if checkpoint.original is not None:  # its image token is no row of the vocabulary
        return own if own and "image" in own else conversation(checkpoint.original, vocab.tokens)
    if own and "image" in own:
        return own
    family = LLAMA3_TEMPLATE if LLAMA3_HEADER in vocab.tokens else DEFAULT_TEMPLATE
    return family.replace(IMAGE_TOKEN, vocab.tokens[image_token_id])


def put_right(template: str, vocab: Vocab) -> tuple[str, tuple[str, ...]]:
    """(the template, a remark if it was changed): early llava-v1.6-mistral-7b-hf ends answers with <\\s> for </s>."""
    if END not in vocab.tokens or not WRONG_END.search(template):
        return template, ()
    remark = "chat template: it ends answers with <\\s>, which is no token; now </s>, as its later revisions have it"
    return WRONG_END.sub(END, template), (remark,)


def end_ids(checkpoint: Checkpoint, config: LlavaConfig, vocab: Vocab) -> list[int]:
    """Every end-of-sequence id: config.json's, the tokenizer's, generation_config.json's.

    A byte-level vocabulary has no </s> at LlamaConfig's default of 2: there only ids in the files count.
    """
    text = checkpoint.config.get("text_config") or {}
    configured = text.get("eos_token_id") if vocab.merges else list(config.text.eos_ids)
    generation = checkpoint.files.get("generation_config.json", {}).get("eos_token_id")
    ids = [*_listed(configured), vocab.eos_id, *_listed(generation)]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < config.text.n_vocab:
            raise ConvertError(f"eos_token_id: {i!r}, expected an id below {config.text.n_vocab}")
    return list(dict.fromkeys(ids))


def _listed(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]

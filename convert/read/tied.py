"""Whether the text model's output head is its token embedding, decided as transformers decides it.

Knows config.json's flag and both tensors' bytes; no GGUF.
"""

from __future__ import annotations

from dataclasses import replace

from pocketllava.convert.read.checkpoint import Checkpoint
from pocketllava.convert.read.config import LlavaConfig
from pocketllava.convert.read.source_reader import SourceReader
from pocketllava.convert.read.sources import SourceTensor

HEAD, EMBEDDING = "text.lm_head.weight", "text.embed_tokens.weight"
COMPARED_BYTES = 1 << 22


def as_transformers_ties(checkpoint: Checkpoint, config: LlavaConfig) -> tuple[Checkpoint, LlavaConfig]:
    """Both, corrected where config.json says that head and embedding are one (modeling_utils.py, tie_weights).

    Where both tensors are there and differ they stay two; where only the head is, it is the embedding too.
    """
    head, embedding = (checkpoint.tensors.get(name) for name in (HEAD, EMBEDDING))
    if not config.text.tied or head is None:
        return checkpoint, config
    if embedding is None:
        tensors = {**checkpoint.tensors, EMBEDDING: head}
        del tensors[HEAD]
        remark = f"tie_word_embeddings: {head.name} is the token embedding too; the checkpoint holds no other"
        return _with(checkpoint, remark, tensors), config
    if _equal(head, embedding):
        return checkpoint, config
    remark = f"tie_word_embeddings: true, but {head.name} differs from {embedding.name}; both are used"
    untied = replace(config, text=replace(config.text, tied=False))
    return _with(checkpoint, remark, checkpoint.tensors), untied


def _with(checkpoint: Checkpoint, remark: str, tensors: dict[str, SourceTensor]) -> Checkpoint:
    return replace(checkpoint, tensors=tensors, remarks=(*checkpoint.remarks, remark))


def _equal(a: SourceTensor, b: SourceTensor) -> bool:
    """Whether two tensors hold the same bytes; in two types they are taken as different, which loses nothing."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with SourceReader() as reader:
        return all(
            reader.read(a, first, n) == reader.read(b, first, n)
            for first in range(0, a.n_bytes, COMPARED_BYTES)
            for n in [min(COMPARED_BYTES, a.n_bytes - first)]
        )

"""Captions as a callable for Ray Data's map_batches, or anything else that hands over batches of columns.

Ray itself is not imported: actors load the model, each with its share of the machine's cores. One bad file is a row
with its error. Resuming: leave out the paths that `done_paths` finds in the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pocketllava.album.asking import Job, Reply, replies
from pocketllava.album.quality import mark_of
from pocketllava.errors import InputError, UnsupportedOption
from pocketllava.llamacpp.devices import cores
from pocketllava.llava import Llava
from pocketllava.types import sampling

Batch = dict[str, Any]


class Captioner:
    """An actor: {"path": [...], "bytes": [...]} -> the paths, captions, finish reasons, tokens, marks and errors.

    Args:
        model: As for Llava.load.
        question: Asked about every picture.
        actors: How many of them share a machine's cores; llama.cpp's threads wait by spinning.
        options: Fields of Options, such as {"max_tokens": 100}.
        **load: Fields of LoadOptions.
    """

    def __init__(
        self,
        model: str,
        question: str = "Describe the image.",
        *,
        actors: int = 1,
        options: Mapping[str, Any] | None = None,
        **load: Any,
    ) -> None:
        if actors < 1:
            raise InputError(f"actors: found {actors}, expected at least 1")
        self.question, self.options = question, sampling(None, **(options or {}))
        load.setdefault("n_threads", max(1, cores() // actors))
        self.llava = Llava.load(model, **load)

    def __call__(self, batch: Batch) -> Batch:
        """A row for every row, in their order."""
        jobs = [
            Job(bytes(data), self.question, path)
            for path, data in zip(batch["path"], batch["bytes"], strict=True)
        ]
        rows = [
            self._row(job, reply) for job, reply in replies(self.llava, jobs, self.options, lambda: False)
        ]
        return {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]} if rows else {}

    def _row(self, job: Job, reply: Reply | Exception) -> dict[str, Any]:
        if not isinstance(reply, Reply):
            return {"path": str(job.context), "caption": None, "finish_reason": None, "tokens": 0, "mark": "",
                    "error": str(reply)}  # fmt: skip
        mark = mark_of(reply.text, reply.finish_reason, looped=reply.looped, retried=reply.retried, deny=())
        return {"path": str(job.context), "caption": reply.text, "finish_reason": reply.finish_reason,
                "tokens": reply.tokens, "mark": mark, "error": None}  # fmt: skip


def done_paths(output: Path) -> set[str]:
    """The paths that are in a folder of parquet files already; none where there is no folder."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UnsupportedOption(
            'done_paths: it needs pyarrow; install it with pip install "pocketllava[parquet]"'
        ) from error
    files: Sequence[Path] = sorted(output.glob("*.parquet")) if output.is_dir() else ()
    return {path for file in files for path in parquet.read_table(file, columns=["path"])["path"].to_pylist()}

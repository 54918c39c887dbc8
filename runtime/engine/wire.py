"""Messages, options, chunks and errors <-> what a frame holds. Knows types; no pipes, no engine.

Pictures go as they were given: paths and data URIs as text, files' bytes as they are. PIL images and arrays are
pickled, without classes of the caller's, by the process that loads the model for the child that it started; nothing
pickled ever comes back.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pocketllava import errors
from pocketllava.errors import BackendError, PocketLlavaError
from pocketllava.types import (
    Choice,
    Chunk,
    ImageSource,
    Message,
    Options,
    Timings,
    TokenLogprob,
    Trace,
)
from pocketllava.vision import sources

KEPT = (str, bytes, int, float, tuple)  # of a picture's metadata: what its transparency and its EXIF are


def pack_messages(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """(JSON, blobs)."""
    blobs: list[bytes] = []
    packed = []
    for message in messages:
        images = [pack_image(image, blobs) for image in message.images]
        packed.append({"role": message.role, "text": message.text, "images": images})
    return packed, blobs


def unpack_messages(packed: list[dict[str, Any]], blobs: Sequence[bytes]) -> list[Message]:
    """In the child."""
    following = iter(blobs)
    return [
        Message(m["role"], m["text"], tuple(unpack_image(image, following) for image in m["images"]))
        for m in packed
    ]


def pack_image(image: ImageSource, blobs: list[bytes]) -> list[str]:
    """[kind] or [kind, text]; what is no text goes behind `blobs`. Raises ImageError."""
    if isinstance(image, str):
        return ["text", image]
    if isinstance(image, os.PathLike):
        return ["path", os.fsdecode(image)]
    content = sources.read(image)
    if isinstance(content, bytes):
        blobs.append(content)
        return ["bytes"]
    blobs.append(pickle.dumps(_plain(content), pickle.HIGHEST_PROTOCOL))
    return ["pickle"]


def _plain(content: sources.Content) -> sources.Content:
    """The same pixels in an object that the child can make, whose class may be one of the caller's program."""
    if isinstance(content, Image.Image):
        info, *rest = content.__getstate__()
        plain = Image.Image()
        plain.__setstate__([{k: v for k, v in info.items() if type(v) in KEPT}, *rest])
        return plain
    array = np.asarray(content)
    if array.dtype.hasobject:  # no picture: the child says so by its type and shape
        return np.empty(array.shape, array.dtype)
    return array


def unpack_image(packed: list[str], blobs: Iterator[bytes]) -> ImageSource:
    """In the child."""
    from pathlib import Path

    kind = packed[0]
    if kind in ("text", "path"):
        return packed[1] if kind == "text" else Path(packed[1])
    image: ImageSource = next(blobs) if kind == "bytes" else pickle.loads(next(blobs))
    return image


def pack_options(options: Options) -> dict[str, Any]:
    """Its fields; choices and stop are lists of texts."""
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    for name in ("stop", "choices"):
        if fields[name] is not None:
            fields[name] = list(fields[name])
    return fields


def unpack_options(fields: dict[str, Any]) -> Options:
    """In the child."""
    for name in ("stop", "choices"):
        if fields[name] is not None:
            fields[name] = tuple(fields[name])
    return Options(**fields)


def pack_chunk(chunk: Chunk) -> dict[str, Any]:
    """Its fields; bytes as hexadecimal digits."""
    return {
        "text": chunk.text,
        "token_ids": list(chunk.token_ids),
        "finish_reason": chunk.finish_reason,
        "timings": dataclasses.asdict(chunk.timings) if chunk.timings else None,
        "logprobs": [
            [t.token, t.logprob, t.bytes.hex(), [[text, p, raw.hex()] for text, p, raw in t.top]]
            for t in chunk.logprobs
        ],
        "choices": [[choice.text, choice.probability] for choice in chunk.choices],
    }


def unpack_chunk(fields: dict[str, Any]) -> Chunk:
    """In the parent."""
    timings = fields["timings"]
    if timings is not None:
        timings = Timings(**{**timings, "devices": tuple(timings["devices"])})
    logprobs = tuple(
        TokenLogprob(token, p, bytes.fromhex(raw), tuple((x, q, bytes.fromhex(b)) for x, q, b in top))
        for token, p, raw, top in fields["logprobs"]
    )
    return Chunk(
        fields["text"],
        tuple(fields["token_ids"]),
        fields["finish_reason"],
        timings,
        logprobs,
        tuple(Choice(text, probability) for text, probability in fields["choices"]),
    )


def unpack_trace(fields: dict[str, Any]) -> Trace:
    """In the parent; lists are tuples there."""
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return Trace(**values)


def pack_error(error: BaseException) -> dict[str, Any]:
    """An error's class, message and fields; what is none of this package's becomes a BackendError."""
    if not isinstance(error, PocketLlavaError):
        error = BackendError(f"engine: {type(error).__name__}: {error}")
    return {"kind": type(error).__name__, "args": list(error.args), "fields": dict(error.__dict__)}


def unpack_error(packed: Any) -> PocketLlavaError:
    """The same error, as if it had been raised here."""
    kind = getattr(errors, str(packed["kind"]), BackendError)
    if not (isinstance(kind, type) and issubclass(kind, PocketLlavaError)):
        kind = BackendError
    error = kind.__new__(kind, *packed["args"])
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in packed["fields"].items()}
    error.__dict__.update(fields)
    return error

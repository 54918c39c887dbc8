"""OpenAI's chat messages -> Message. Knows their shape; opens no file and no address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pocketllava.errors import ImageError, InputError
from pocketllava.types import Message, Messages

SHAPE = "a list of Message objects or of dicts with role and content"
MAX_QUOTED = 40  # characters of an address that is not opened


def as_messages(messages: Messages) -> list[Message]:
    """A conversation of Message objects, OpenAI's dicts or both -> Message objects.

    Raises InputError and ImageError that name the message by its index.
    """
    if isinstance(messages, Message | Mapping | str | bytes):
        kind = type(messages).__name__
        raise InputError(f"messages: found one {kind}, expected {SHAPE}; put it in a list")
    try:
        entries = list(messages)
    except TypeError:
        raise InputError(f"messages: found {type(messages).__name__}, expected {SHAPE}") from None
    return [_message(index, entry) for index, entry in enumerate(entries)]


def from_openai(message: Mapping[str, Any]) -> Message:
    """An OpenAI chat message -> Message. Its images must be data URIs. Raises InputError, ImageError."""
    if "role" not in message:
        raise InputError("role: missing, expected system, user or assistant")
    role, content = message["role"], message.get("content")
    if content is None or isinstance(content, str):
        return Message(role, content or "")
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InputError(f"content: found {type(content).__name__}, expected a text or a list of parts")
    parts = [_part(part) for part in content]
    texts = [value for kind, value in parts if kind == "text"]
    images = [value for kind, value in parts if kind == "image_url"]
    return Message(role, " ".join(texts), images)


def _message(index: int, entry: object) -> Message:
    if isinstance(entry, Message):
        return entry
    if not isinstance(entry, Mapping):
        raise InputError(f"messages[{index}]: found {type(entry).__name__}, expected a Message or a dict")
    try:
        return from_openai(entry)
    except InputError as error:
        raise type(error)(f"messages[{index}]: {error}") from error


def _part(part: object) -> tuple[str, str]:
    """(type, text or data URI) of a part of a message's content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or kind not in ("text", "image_url") or kind not in part:
        raise InputError(
            f"content: found a part {_quoted(part)}, expected {{'type': 'text', 'text': ...}}"
            " or {'type': 'image_url', 'image_url': {'url': 'data:image/...'}}"
        )
    return kind, _text(part["text"]) if kind == "text" else _data_uri(part["image_url"])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"content: found text of type {type(value).__name__}, expected str")
    return value


def _data_uri(value: object) -> str:
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or url[:5].lower() != "data:":
        raise ImageError(f"image_url: found {_quoted(url)}, expected a data URI (data:image/...;base64,...)")
    return url


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."

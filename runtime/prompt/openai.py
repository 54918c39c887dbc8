"""OpenAI's chat messages -> Message. Knows their shape; opens no file and no address."""

from __future__ import annotations

from typing import Any

from pocketllava.errors import ImageError, InputError
from pocketllava.types import Message


def from_openai(message: dict[str, Any]) -> Message:
    """An OpenAI chat message -> Message. Its images must be data URIs. Raises InputError, ImageError."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return Message(message["role"], content or "")
    texts: list[str] = []
    images: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(part["text"])
        elif kind == "image_url":
            images.append(_data_uri(part["image_url"]))
        else:
            raise InputError(
                f"message content: found a part of type {kind!r}, expected 'text' or 'image_url'"
            )
    return Message(message["role"], " ".join(texts), tuple(images))


def _data_uri(value: Any) -> str:
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or url[:5].lower() != "data:":
        found = str(url)[:40]
        raise ImageError(f"image_url: found {found!r}, expected a data URI (data:image/...;base64,...)")
    return url

"""Thirty conversations whose token ids are compared with those of transformers' processor."""

from __future__ import annotations

from pocketllava import Message

Turn = tuple[str, str, int]  # role, text, number of images

PROMPTS: dict[str, list[Turn]] = {
    "image": [("user", "What is shown in the image?", 1)],
    "no image": [("user", "What is the capital of France?", 0)],
    "two images": [("user", "Compare the two images.", 2)],
    "three images": [("user", "Which one is red?", 3)],
    "empty text": [("user", "", 1)],
    "one letter": [("user", "a", 1)],
    "leading space": [("user", " What is it?", 1)],
    "leading spaces": [("user", "   What is it?", 1)],
    "trailing space": [("user", "What is it? ", 1)],
    "trailing spaces": [("user", "What is it?    ", 0)],
    "only spaces": [("user", "     ", 1)],
    "line breaks": [("user", "What\nis\n\nit?\n", 1)],
    "leading line break": [("user", "\nWhat is it?", 1)],
    "tabs": [("user", "a\tb\t\tc", 0)],
    "emoji": [("user", "What is this? 🙂🎈", 1)],
    "joined emoji": [("user", "👩‍👩‍👧 and 🇫🇷", 1)],
    "chinese": [("user", "这张图片里有什么？", 1)],
    "japanese": [("user", "この画像には何が写っていますか？", 1)],
    "korean": [("user", "이 이미지에 무엇이 있나요?", 0)],
    "arabic": [("user", "ماذا يوجد في الصورة؟", 1)],
    "accents": [("user", "Qu'est-ce que c'est? ¿Qué hay?", 1)],
    "combining": [("user", "e\u0301 a\u0308", 1)],
    "code": [("user", "def main(argument):\n    return argument + 1  # comment", 1)],
    "json": [("user", '{"a": [1, 2.5e-3], "b": null}', 0)],
    "digits": [("user", "3.14159 + 2,718 = 5.85959?", 1)],
    "control characters": [("user", "a\x07b\x1bc", 0)],
    "long": [("user", "The quick brown fox jumps over the lazy dog. " * 20, 1)],
    "two turns": [
        ("user", "What is shown in the image?", 1),
        ("assistant", "The image shows a red circle.", 0),
        ("user", "Is there a blue square?", 0),
    ],
    "images in two turns": [
        ("user", "What is this?", 1),
        ("assistant", "A red circle.", 0),
        ("user", "And this?", 1),
    ],
    "system": [
        ("system", "A chat between a curious human and an artificial intelligence assistant.", 0),
        ("user", "What is shown in the image?", 1),
        ("assistant", "A dog.", 0),
        ("user", "Describe it in detail.", 0),
        ("assistant", "It is small.", 0),
        ("user", "Thanks", 0),
    ],
}


def messages(turns: list[Turn], picture: object = b"") -> list[Message]:
    """As pocketllava takes them; every image is the same picture."""
    return [Message(role, text, (picture,) * n) for role, text, n in turns]  # type: ignore[arg-type]


def for_transformers(turns: list[Turn]) -> list[dict[str, object]]:
    """As transformers' chat templates take them: images before the text."""
    return [
        {"role": role, "content": [{"type": "image"}] * n + [{"type": "text", "text": text}]}
        for role, text, n in turns
    ]

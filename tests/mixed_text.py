"""300 lines of mixed text, the same every time: languages, code, emoji, digits, runs of whitespace, contractions."""

from __future__ import annotations

import random

PIECES = (
    "The quick brown fox jumps over the lazy dog", "What is shown in the image?", "Describe it in detail, please.",
    "I've told him he's there; they'll say we'd better not, I'm sure it isn't", "DON'T SHOUT, I'LL HEAR YOU'RE HERE",
    "Was ist auf dem Bild zu sehen? Über Größe läßt sich streiten", "Qu'est-ce que c'est ? L'été à Nîmes",
    "¿Qué hay en la imagen? ¡Mañana será otro día!", "這張圖片裡有什麼？", "这张图片里有什么？我想在apple工作1314151天～",
    "この画像には何が写っていますか？カタカナ", "이 이미지에 무엇이 있나요?", "ماذا يوجد في الصورة؟", "מה יש בתמונה?",
    "Что изображено на картинке?", "Τι δείχνει η εικόνα;", "चित्र में क्या है?", "ภาพนี้มีอะไรบ้าง", "កាន់តែពិសេសអាច",
    "def main(argument):\n    return argument + 1  # comment", "for (int i = 0; i < n; ++i) { x[i] *= 2.5e-3f; }",
    '{"a": [1, 2.5e-3], "b": null, "c": "\\u00e9"}', "SELECT * FROM t WHERE id >= 42 AND name LIKE '%x%';",
    "<div class=\"a\">&nbsp;</div>", "$ git log --oneline | head -n 10\r\n", "https://example.org/a?b=c&d=%20#e",
    "🙂🎈", "👩‍👩‍👧 and 🇫🇷", "😶‍🌫️ (multiple emojis concatenated) ✅ 🦙🦙", "e\u0301 a\u0308 ﬁ ½ ² Ⅷ ٣٤٥",
    "3 33 333 3333 33333 333333", "3.14159 + 2,718 = 5.85959", "2026-11-23T01:38:51Z", "1/3 of 1,000,000",
    " ", "   ", "\t", "\t\t ", "\n", "\n\n", " \n  \n", "\u00a0", "\u3000", "\u200b", "\x07", "......!!!!!!??????",
    "''''''```````\"\"\"\"", "------=======", "a", "I", "'s", "'Re", "snake_case camelCase PascalCase SCREAMING",
)  # fmt: skip
N_LINES = 300


def lines() -> list[str]:
    """Every piece alone, then pieces joined by nothing or by spaces."""
    rng = random.Random(5)
    joined = [
        rng.choice(("", " ", "  ")).join(rng.choices(PIECES, k=rng.randint(2, 5)))
        for _ in range(N_LINES - len(PIECES))
    ]
    return [*PIECES, *joined]

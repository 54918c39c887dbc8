"""Flash attention or not, over a typical conversation: one picture, three questions, answers of 60 tokens.

    python benchmarks/flash_attention.py BUNDLE [--image FILE] [-n 3] [--image-tokens 128]

And over a lone question with an answer of 20 tokens. Each in a process of its own (this script with --side), in turn,
with pictures that it has not seen; medians of wall seconds. Answers do not end early. Run it alone.
"""

from __future__ import annotations

import argparse
import time

from arguments import arguments, compare

from pocketllava import Llava, Message, Options
from pocketllava.measure.speed import FIRST, MORE, SECOND, jpeg, unseen
from pocketllava.vision.image import load

ROWS = {
    "first": "first token, new image, s",
    "lone": "a lone question, answer of 20 tokens, s",
    "conversation": "one image, three questions, answers of 60 tokens, s",
    "decoding": "decoding in it, tokens/s",
}
LONE, LONG = 20, 60


def one_side(a: argparse.Namespace) -> dict[str, float]:
    """In a child process."""
    picture = load(a.image)
    with Llava.load(a.bundle, n_ctx=2048, flash_attn=a.side, image_tokens=a.image_tokens) as llava:
        llava.ask(jpeg(unseen(picture)), FIRST, max_tokens=2)
        start = time.perf_counter()
        lone = llava.ask(jpeg(unseen(picture)), FIRST, options=Options(max_tokens=LONE))
        lone_s, seen = time.perf_counter() - start, jpeg(unseen(picture))
        turns: list[Message] = []
        start, decode_s, n_tokens = time.perf_counter(), 0.0, 0
        for question in (FIRST, SECOND, MORE[0]):
            turns.append(Message("user", question, () if turns else seen))
            answer = llava.chat(turns, options=Options(max_tokens=LONG))
            turns.append(Message("assistant", answer.text))
            decode_s += answer.timings.decode_s
            n_tokens += answer.timings.answer_tokens - 1
        return {
            "first": lone.timings.first_token_s,
            "lone": lone_s,
            "conversation": time.perf_counter() - start,
            "decoding": n_tokens / decode_s,
            "tokens": n_tokens,
        }


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--image-tokens", type=int)
    compare(parser, __file__, one_side, ("on", "off"), ROWS, "flash attention")


if __name__ == "__main__":
    main()

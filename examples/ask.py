"""Ask one question about an image, then a follow-up in the same conversation.

python examples/ask.py [MODEL IMAGE]
"""

import sys
from pathlib import Path

from pocketllava import Llava, Message

DEFAULTS = ["demo", str(Path(__file__).with_name("scene.png"))]


def main(model: str, image: str) -> None:
    """The second answer is quick: the image stays in the KV cache."""
    with Llava.load(model) as llava:
        question = "What is at the center?"
        first = llava.ask(image, question, max_tokens=64)
        print(question, first.text)
        conversation = [
            Message("user", question, image),
            Message("assistant", first.text),
            Message("user", "How big is it?"),
        ]
        second = llava.chat(conversation)
        print("How big is it?", second.text)
        usage = second.usage
        print(f"{usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were already evaluated")


if __name__ == "__main__":
    main(*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :])

"""Keep your llama_cpp.Llama and its OpenAI-style messages; take only the chat handler from pocketllava.

python examples/chat_handler.py [MODEL IMAGE]

MODEL is a bundle's folder, or "demo". Images must be data URIs; the handler opens no file and no URL.
"""

import base64
import sys
from pathlib import Path
from typing import Any

from llama_cpp import Llama

from pocketllava.integrations.llama_cpp import LlavaChatHandler
from pocketllava.names import open_bundle

DEFAULTS = ["demo", str(Path(__file__).with_name("scene.png"))]


def data_uri(image: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode("ascii")


def main(model: str, image: str) -> None:
    bundle = open_bundle(model)
    handler = LlavaChatHandler(bundle.folder)
    llama = Llama(str(bundle.model), chat_handler=handler, n_ctx=2048, n_batch=1024, verbose=False)
    content = [
        {"type": "image_url", "image_url": {"url": data_uri(image)}},
        {"type": "text", "text": "What is at the center?"},
    ]
    messages: Any = [{"role": "user", "content": content}]  # llama_cpp's own types are narrower than OpenAI's
    completion: Any = llama.create_chat_completion(messages, temperature=0.0, max_tokens=64)
    print(completion["choices"][0]["message"]["content"].strip())
    handler.close()
    llama.close()


if __name__ == "__main__":
    main(*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :])

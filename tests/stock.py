"""What stock llama-cpp-python computes from the same files, to put its figures beside ours."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava import Bundle, Llava
from pocketllava.vision.encoder import VisionEncoder


def stock_features(llava: Llava, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Image features as libmtmd gives them out."""
    with llava.session() as session:
        text = session.text
        encoder = VisionEncoder(llava.bundle.mmproj_header, text.model, n_threads=2, n_embd=text.n_embd)
        encoder.correction.enabled = False
        try:
            return encoder.encode(pixels)
        finally:
            encoder.close()


def stock_answers(bundle: Bundle, pictures: list[bytes], question: str, n_tokens: int) -> list[list[int]]:
    """Greedy token ids of llama_cpp's own handler, each from a fresh cache."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    handler = Llava15ChatHandler(clip_model_path=str(bundle.mmproj), verbose=False)
    llama = Llama(str(bundle.model), chat_handler=handler, n_ctx=2048, n_threads=2, verbose=False)
    answers: list[list[int]] = []
    generate = llama.generate
    taken: list[int] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        for token in generate(*args, **kwargs):
            taken.append(token)
            yield token

    llama.generate = noted  # type: ignore[method-assign]
    for picture in pictures:
        taken.clear()
        uri = "data:image/png;base64," + base64.b64encode(picture).decode()
        content = [{"type": "image_url", "image_url": uri}, {"type": "text", "text": question}]
        llama.create_chat_completion(
            [{"role": "user", "content": content}],  # type: ignore[list-item]
            max_tokens=n_tokens, temperature=0.0, repeat_penalty=1.0,
        )  # fmt: skip
        answers.append(taken[:n_tokens])
    llama.close()
    return answers

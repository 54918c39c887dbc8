"""How far a repair moves the image features: both files encode one drawn picture, in a child process.

libmtmd needs a text model of the same width, so one of a few kilobytes, never evaluated, is written to a temporary
folder. A child, because the file before its repair is known to be wrong, and libmtmd aborts on some faults.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError, PocketLlavaError
from pocketllava.llamacpp.children import run_child
from pocketllava.models.gguf_header import Header
from pocketllava.models.mmproj_contract import MmprojInfo, check_mmproj

SCENE = 10_000_003  # the demo's picture
REFUSED = "refused"


def features_move(before: Path, after: Path) -> float | None:
    """||before - after|| / ||after||, None where llama.cpp cannot use BEFORE. Raises BackendError."""
    result = run_child(f"{__name__}:measure", before, after)
    if result.answer is None:
        raise BackendError(f"{after}: its features could not be measured ({result.reason})")
    return None if result.answer == REFUSED else float(result.answer)


def tiny_text_model(path: Path, width: int) -> Path:
    """A Llama of one block and four tokens, n_embd = width, all weights zero: enough to be loaded."""
    from gguf import GGUFValueType as V
    from gguf import TokenType

    from pocketllava.models.gguf_writer import Key, write_floats

    numbers = {
        "block_count": 1, "context_length": 64, "embedding_length": width, "feed_forward_length": 32,
        "attention.head_count": 1, "attention.head_count_kv": 1, "attention.key_length": 2,
        "attention.value_length": 2, "rope.dimension_count": 2,
    }  # fmt: skip
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    keys = [
        *(Key(f"llama.{name}", value, V.UINT32) for name, value in numbers.items()),
        Key("llama.attention.layer_norm_rms_epsilon", 1e-5, V.FLOAT32),
        Key("tokenizer.ggml.model", "llama", V.STRING),
        Key("tokenizer.ggml.tokens", ["<unk>", "<s>", "</s>", "<0x0A>"], V.ARRAY, V.STRING),
        Key("tokenizer.ggml.scores", [0.0] * 4, V.ARRAY, V.FLOAT32),
        Key("tokenizer.ggml.token_type", list(map(int, kinds)), V.ARRAY, V.INT32),
    ]
    shapes = {
        "token_embd": (4, width),
        "output_norm": (width,),
        **{f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}": (2, width) for name in ("attn_q", "attn_k", "attn_v")},
        "blk.0.attn_output": (width, 2),
        **{f"blk.0.{name}": (32, width) for name in ("ffn_gate", "ffn_up")},
        "blk.0.ffn_down": (width, 32),
    }
    arrays = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    return write_floats(path, "llama", keys, arrays)


def measure(before: str, after: str) -> Iterator[str | float]:
    """In the child. The first answer counts if libmtmd ends the process over BEFORE."""
    from pocketllava.llamacpp.log import capture_log
    from pocketllava.llamacpp.text_model import load_model

    capture_log()
    info = check_mmproj(Header.read(Path(after)))
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(tiny_text_model(Path(folder) / "tiny.gguf", info.projected_width))
    right = _features(Path(after), model, info)
    yield REFUSED
    try:
        wrong = _features(Path(before), model, info)
    except PocketLlavaError:
        return
    yield float(np.linalg.norm(wrong - right) / np.linalg.norm(right))


def _features(path: Path, model: Any, info: MmprojInfo) -> npt.NDArray[np.float32]:
    from pocketllava.llamacpp.devices import cores
    from pocketllava.models.demo import scenes
    from pocketllava.models.preprocessing import Preprocessing
    from pocketllava.vision.encoder import VisionEncoder
    from pocketllava.vision.image import preprocess

    picture = scenes.scene(SCENE).draw()
    pixels = preprocess(picture, Preprocessing(shortest_edge=info.image_size, crop_size=info.image_size))
    encoder = VisionEncoder(
        Header.read(path), model, n_threads=cores(), n_embd=info.projected_width, info=info
    )
    try:
        return encoder.encode(pixels)
    finally:
        encoder.close()

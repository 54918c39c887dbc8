"""How far a repair moves the image features: both files encode one drawn picture, in a child process.

    python -m pocketllava.measure.feature_drift BEFORE AFTER

The child prints ||before - after|| / ||after||, or `refused` where llama.cpp does not load BEFORE. libmtmd
wants a text model of the same width, so one of a few kilobytes, never evaluated, is made on the fly. A
child, because BEFORE is known to be wrong, and libmtmd ends its process for some of what can be wrong.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.errors import BackendError, PocketLlavaError

SCENE = 10_000_003  # the demo's picture
REFUSED = "refused"
TIMEOUT_S = 600


def features_move(before: Path, after: Path) -> float | None:
    """Relative difference of the features, or None where llama.cpp cannot use BEFORE. Raises BackendError."""
    command = [sys.executable, "-m", "pocketllava.measure.feature_drift", str(before), str(after)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{after}: its features could not be measured ({error})") from error
    words = done.stdout.split()
    if words and (done.returncode == 0 or words == [REFUSED]):
        return None if words[-1] == REFUSED else float(words[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()]
    raise BackendError(f"{after}: its features could not be measured ({said[-1] if said else 'a crash'})")


def tiny_text_model(path: Path, width: int) -> Path:
    """A Llama of one block and three tokens, n_embd = width, all weights zero: enough to be loaded."""
    from gguf import GGUFWriter, TokenType

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(2)
    writer.add_value_length(2)
    writer.add_rope_dimension_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", "<0x0A>"])
    writer.add_token_scores([0.0] * 4)
    writer.add_token_types([TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE])
    shapes = {
        "token_embd": (4, width),
        "output_norm": (width,),
        **{f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}": (2, width) for name in ("attn_q", "attn_k", "attn_v")},
        "blk.0.attn_output": (width, 2),
        **{f"blk.0.{name}": (32, width) for name in ("ffn_gate", "ffn_up")},
        "blk.0.ffn_down": (width, 32),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _main(before: Path, after: Path) -> str:
    from pocketllava.llamacpp.log import capture_log
    from pocketllava.llamacpp.text_model import load_model
    from pocketllava.models.gguf_header import Header
    from pocketllava.models.mmproj_contract import check_mmproj

    capture_log()
    info = check_mmproj(Header.read(after))
    with tempfile.TemporaryDirectory() as folder:
        path = tiny_text_model(Path(folder) / "tiny.gguf", info.projected_width)
        model = load_model(path)
    right = _features(after, model, info)
    sys.stdout.write(f"{REFUSED}\n")  # the last word counts: this one, if the next line ends the process
    sys.stdout.flush()
    try:
        wrong = _features(before, model, info)
    except PocketLlavaError:
        return REFUSED
    return str(float(np.linalg.norm(wrong - right) / np.linalg.norm(right)))


def _features(path: Path, model: Any, info: Any) -> npt.NDArray[np.float32]:
    from pocketllava.llamacpp.devices import cores
    from pocketllava.models.demo import scenes
    from pocketllava.models.preprocessing import Preprocessing
    from pocketllava.vision.encoder import VisionEncoder
    from pocketllava.vision.image import preprocess

    picture = scenes.scene(SCENE).draw()
    pixels = preprocess(picture, Preprocessing(shortest_edge=info.image_size, crop_size=info.image_size))
    encoder = VisionEncoder(
        path, model, n_threads=cores(), n_embd=info.projected_width, use_gpu=False, info=info
    )
    try:
        return encoder.encode(pixels)
    finally:
        encoder.close()


if __name__ == "__main__":
    sys.stdout.write(_main(Path(sys.argv[1]), Path(sys.argv[2])) + "\n")

"""Child process of verify.py: loads a text model and an mmproj, evaluates one token, encodes one image.

    python -m pocketllava.convert.write.load_test MODEL MMPROJ

A large tower is opened whole, but encodes with its first block only (shallow.py).

Exits 0 if all of it worked; otherwise the last line of stderr says what did not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from pocketllava.convert.write.shallow import shallow

THREADS = 1  # for little work on a mapped file: more of them would wait for the disk, spinning


def main(model_path: str, mmproj_path: str) -> None:
    """Raise SystemExit with one line if anything fails; llama.cpp may also end the process itself."""
    import llama_cpp
    from llama_cpp import mtmd_cpp

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # mapped as it lies: no repacking, little memory
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), params)
    if not model:
        raise SystemExit(f"{model_path}: llama.cpp refuses it")
    _evaluate(llama_cpp, model)
    copy = shallow(Path(mmproj_path))
    if copy and not _opened(mtmd_cpp, mmproj_path, model):
        raise SystemExit(f"{mmproj_path}: libmtmd refuses it")
    vision = _vision(mtmd_cpp)
    vision.warmup = True  # encodes an image
    context = mtmd_cpp.mtmd_init_from_file(str(copy or mmproj_path).encode(), model, vision)
    if not context or not mtmd_cpp.mtmd_support_vision(context):
        raise SystemExit(f"{mmproj_path}: libmtmd cannot encode an image with it")


def _vision(mtmd_cpp: Any) -> Any:
    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu, params.print_timings, params.warmup, params.n_threads = False, False, False, THREADS
    return params


def _opened(mtmd_cpp: Any, path: str, model: object) -> bool:
    """Whether libmtmd finds every key and tensor in a file; it is stopped after the first tensor's data."""
    reached: list[float] = []

    def stop(progress: float, _data: object) -> bool:
        reached.append(progress)
        return False

    params = _vision(mtmd_cpp)
    params.progress_callback = callback = mtmd_cpp.mtmd_progress_callback(stop)
    context = mtmd_cpp.mtmd_init_from_file(path.encode(), model, params)
    del callback
    return bool(context) or any(reached)


def _evaluate(llama_cpp: object, model: object) -> None:
    import ctypes

    lib: object = llama_cpp
    params = lib.llama_context_default_params()  # type: ignore[attr-defined]
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = 256, 32, 32, THREADS
    context = lib.llama_init_from_model(model, params)  # type: ignore[attr-defined]
    vocab = lib.llama_model_get_vocab(model)  # type: ignore[attr-defined]
    token = (ctypes.c_int32 * 1)(lib.llama_vocab_bos(vocab))  # type: ignore[attr-defined]
    if not context or lib.llama_decode(context, lib.llama_batch_get_one(token, 1)):  # type: ignore[attr-defined]
        raise SystemExit("text model: llama.cpp could not evaluate a token")
    logits = lib.llama_get_logits_ith(context, 0)  # type: ignore[attr-defined]
    values = np.ctypeslib.as_array(logits, (lib.llama_vocab_n_tokens(vocab),))  # type: ignore[attr-defined]
    if not np.isfinite(values).all():
        raise SystemExit("text model: its logits are not finite")
    lib.llama_free(context)  # type: ignore[attr-defined]  # its memory, before the vision tower takes some


if __name__ == "__main__":
    main(*sys.argv[1:3])

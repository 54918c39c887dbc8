"""Child process of verify.py: loads a text model and an mmproj, evaluates one token, encodes one image.

    python -m pocketllava.convert.loadtest MODEL MMPROJ

Exits 0 if all of it worked; otherwise the last line of stderr says what did not.
"""

from __future__ import annotations

import sys

import numpy as np


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
    vision = mtmd_cpp.mtmd_context_params_default()
    vision.use_gpu, vision.print_timings, vision.warmup = False, False, True
    context = mtmd_cpp.mtmd_init_from_file(mmproj_path.encode(), model, vision)  # encodes an image to warm up
    if not context or not mtmd_cpp.mtmd_support_vision(context):
        raise SystemExit(f"{mmproj_path}: libmtmd refuses it")


def _evaluate(llama_cpp: object, model: object) -> None:
    import ctypes

    lib: object = llama_cpp
    params = lib.llama_context_default_params()  # type: ignore[attr-defined]
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    context = lib.llama_init_from_model(model, params)  # type: ignore[attr-defined]
    vocab = lib.llama_model_get_vocab(model)  # type: ignore[attr-defined]
    token = (ctypes.c_int32 * 1)(lib.llama_vocab_bos(vocab))  # type: ignore[attr-defined]
    if not context or lib.llama_decode(context, lib.llama_batch_get_one(token, 1)):  # type: ignore[attr-defined]
        raise SystemExit("text model: llama.cpp could not evaluate a token")
    logits = lib.llama_get_logits_ith(context, 0)  # type: ignore[attr-defined]
    values = np.ctypeslib.as_array(logits, (lib.llama_vocab_n_tokens(vocab),))  # type: ignore[attr-defined]
    if not np.isfinite(values).all():
        raise SystemExit("text model: its logits are not finite")


if __name__ == "__main__":
    main(*sys.argv[1:3])

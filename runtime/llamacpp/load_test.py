"""Loads a text model and an mmproj, evaluates one token and encodes one image: called in a child (children.py).

Knows llama_cpp's calls and libmtmd's names. libmtmd copies a tower into its own memory, 0.6 GB for LLaVA-1.5's. A
large one is therefore tested in two steps: libmtmd opens the file, looks up every key and tensor, and is stopped
after the first tensor's data; then it encodes an image with a copy in memory that has only the first block.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pocketllava.errors import BackendError
from pocketllava.llamacpp.private import set_fields
from pocketllava.models.gguf_header import Header
from pocketllava.models.gguf_writer import header_bytes, padding, stored_keys
from pocketllava.models.limits import check_room

FUNCTION = "pocketllava.llamacpp.load_test:load_test"
LARGE_BYTES = 256 << 20
BLOCKS = 1
DEPTH, FEATURES = "clip.vision.block_count", "clip.vision.feature_layer"
THREADS = 1  # for little work on a mapped file: more of them would wait for the disk, spinning


def load_test(model_path: str, mmproj_path: str, large_bytes: str = str(LARGE_BYTES)) -> bool:
    """True if all of it works. Raises BackendError; llama.cpp may also end the process.

    large_bytes: size of an mmproj from which on it is tested in two steps.
    """
    import llama_cpp
    from llama_cpp import mtmd_cpp

    check_room(
        Path(mmproj_path), min(_size(mmproj_path), int(large_bytes)), _size(model_path), threads=THREADS
    )
    params = llama_cpp.llama_model_default_params()
    # no device takes part (engine/loading.py); the file as mapped: no repacking, little memory
    set_fields(params, n_gpu_layers=0, split_mode=0, main_gpu=-1, use_extra_bufts=False)
    model = llama_cpp.llama_model_load_from_file(model_path.encode(), params)
    if not model:
        raise BackendError(f"{model_path}: llama.cpp refuses it")
    _evaluate(llama_cpp, model)
    copy = shallow_copy(Path(mmproj_path), int(large_bytes))
    if copy and not _opens(mtmd_cpp, mmproj_path, model):
        raise BackendError(f"{mmproj_path}: libmtmd refuses it")
    vision = _vision_params(mtmd_cpp)
    vision.warmup = True  # encodes an image
    context = mtmd_cpp.mtmd_init_from_file(str(copy or mmproj_path).encode(), model, vision)
    if not context or not mtmd_cpp.mtmd_support_vision(context):
        raise BackendError(f"{mmproj_path}: libmtmd cannot encode an image with it")
    return True


def _size(path: str) -> int:
    return Path(path).stat().st_size


def _vision_params(mtmd_cpp: Any) -> Any:
    params = mtmd_cpp.mtmd_context_params_default()
    set_fields(params, use_gpu=False, print_timings=False, warmup=False, n_threads=THREADS)
    return params


def _opens(mtmd_cpp: Any, path: str, model: Any) -> bool:
    """Whether libmtmd finds every key and tensor in a file; it is stopped after the first tensor's data."""
    reached: list[float] = []

    def stop(progress: float, _data: object) -> bool:
        reached.append(progress)
        return False

    params = _vision_params(mtmd_cpp)
    params.progress_callback = callback = mtmd_cpp.mtmd_progress_callback(stop)
    context = mtmd_cpp.mtmd_init_from_file(path.encode(), model, params)
    del callback
    return bool(context) or any(reached)


def _evaluate(llama_cpp: Any, model: Any) -> None:
    params = llama_cpp.llama_context_default_params()
    set_fields(params, n_ctx=256, n_batch=32, n_ubatch=32, n_threads=THREADS)
    context = llama_cpp.llama_init_from_model(model, params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    token = (ctypes.c_int32 * 1)(llama_cpp.llama_vocab_bos(vocab))
    if not context or llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)):
        raise BackendError("text model: llama.cpp could not evaluate a token")
    logits = llama_cpp.llama_get_logits_ith(context, 0)
    if not np.isfinite(np.ctypeslib.as_array(logits, (llama_cpp.llama_vocab_n_tokens(vocab),))).all():
        raise BackendError("text model: its logits are not finite")
    llama_cpp.llama_free(context)  # its memory, before the vision tower takes some


def shallow_copy(path: Path, large_bytes: int = LARGE_BYTES) -> Path | None:
    """A copy with one block that lives in memory until the process ends.

    None for a smaller file, a tower whose features come from several blocks, and a platform without memfd_create.
    """
    header = Header.read(path)
    layers = header.keys.get(FEATURES, [0])
    if header.file_bytes < large_bytes or not hasattr(os, "memfd_create") or len(layers) != BLOCKS:
        return None
    copy = Path(f"/proc/self/fd/{os.memfd_create('mmproj')}")
    with copy.open("wb") as file:
        _write_shallow(header, file)
    return copy


def _write_shallow(header: Header, file: BinaryIO) -> None:
    changed = {DEPTH: BLOCKS, FEATURES: [BLOCKS]}
    keys = [type(k)(k.name, changed.get(k.name, k.value), k.kind, k.item) for k in stored_keys(header)]
    infos = [info for info in header.tensors.values() if not _is_deeper(info.name)]
    file.write(header_bytes(str(header.keys["general.architecture"]), keys, infos))
    with header.path.open("rb") as source:
        for info in infos:
            source.seek(header.data_start + info.offset)
            file.write(source.read(info.n_bytes) + padding(info.n_bytes))


def _is_deeper(name: str) -> bool:
    return name.startswith("v.blk.") and int(name.split(".")[2]) >= BLOCKS

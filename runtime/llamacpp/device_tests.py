"""What a device can do, tried: how much memory it gives, and whether its products are summed in F32.

Knows ggml's buffers and one small graph; no models. Figures of drivers are not enough: without VK_EXT_memory_budget
all memory counts as free whoever holds it, and what a device rounds depends on its kind, its driver and switches.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava.llamacpp.devices import address_of
from pocketllava.llamacpp.library import InitParams, ggml
from pocketllava.llamacpp.log import unremarked
from pocketllava.models.gguf_header import F16, F32
from pocketllava.models.machine import Device

Floats = npt.NDArray[np.float32]
BF16 = 30  # enum ggml_type
KINDS = {"F32": F32, "F16": F16, "BF16": BF16}  # others are computed with as F16
HALVINGS = 7  # a hundredth
WIDTH, ROWS, COLUMNS = 1024, 128, 256  # a product like those of a vision tower, of many columns
TEST_BYTES = 8 << 20  # more than the product takes, the backend's own memory included
MOST_ERROR = 1e-4  # F32 sums have 1e-6, F16 sums 1e-3
# ggml-cuda.cu (of ROCm too) reads it with every product; ggml-vulkan.cpp once, when it opens the device.
CUDA_SWITCH = ("GGML_CUDA_CUBLAS_COMPUTE_TYPE", "f32")
VULKAN_SWITCH = ("GGML_VK_DISABLE_F16", "1")


def allocatable(device: Device, n_bytes: int) -> int:
    """n_bytes if the device gives so many now, else about as many as it does; they are given back at once."""
    with unremarked():
        if _gives(device, n_bytes):
            return n_bytes
        low, high = 0, n_bytes
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            low, high = (middle, high) if _gives(device, middle) else (low, middle)
    return low


def offered(device: Device, n_bytes: int) -> Device:
    """The device with the memory that it gives, if that is less than n_bytes."""
    n = allocatable(device, n_bytes)
    return device if n == n_bytes else replace(device, free=min(device.free, n), total=min(device.total, n))


def measured(device: Device, kind: str, *, exact: bool) -> Device:
    """The device, and whether products of weights of this type are as exact there as the CPU's.

    exact: have them so where that can be switched on, for the rest of the process.
    """
    if exact:
        os.environ.setdefault(*CUDA_SWITCH)
    with _switched(*VULKAN_SWITCH) if exact else contextlib.nullcontext():
        switch = os.environ.get(CUDA_SWITCH[0])
        return replace(device, sums_in_f32=_sums_in_f32(device.short_name, KINDS.get(kind, F16), switch))


def _gives(device: Device, n_bytes: int) -> bool:
    """Whether so much can be allocated now, in buffers as large as they may be."""
    kind = ggml().ggml_backend_dev_buffer_type(address_of(device.name))
    most = max(1, int(ggml().ggml_backend_buft_get_max_size(kind)))
    buffers = []
    try:
        while n_bytes > 0:
            buffer = ggml().ggml_backend_buft_alloc_buffer(kind, min(n_bytes, most))
            if not buffer:
                return False
            buffers.append(buffer)
            n_bytes -= most
        return True
    finally:
        for buffer in buffers:
            ggml().ggml_backend_buffer_free(buffer)


@contextlib.contextmanager
def _switched(name: str, value: str) -> Iterator[None]:
    """A variable that is set while the device is opened; a user's own value stays."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


@functools.lru_cache
def _sums_in_f32(name: str, kind: int, _switch: str | None) -> bool:
    """Whether a product of numbers that the type holds is as exact as F32 sums are."""
    address = address_of(name)
    with unremarked():
        if not _gives(Device(name, 0, 0), TEST_BYTES):
            return False
        random = np.random.default_rng(0)
        weights, stored = _held(random.standard_normal((ROWS, WIDTH)), kind)
        inputs, _ = _held(random.standard_normal((COLUMNS, WIDTH)), kind)
        product = _product(address, stored, kind, inputs)
    right = inputs.astype(np.float64) @ weights.astype(np.float64).T
    return product is not None and bool(np.linalg.norm(product - right) < MOST_ERROR * np.linalg.norm(right))


def _held(values: npt.NDArray[np.float64], kind: int) -> tuple[Floats, npt.NDArray[Any]]:
    """Values as a type holds them: as float32, and as they are stored."""
    floats = values.astype(np.float32)
    if kind == BF16:
        stored = (floats.view(np.uint32) >> 16).astype(np.uint16)
        return (stored.astype(np.uint32) << 16).view(np.float32), stored
    if kind == F16:
        return floats.astype(np.float16).astype(np.float32), floats.astype(np.float16)
    return floats, floats


def _product(address: int, weights: npt.NDArray[Any], kind: int, inputs: Floats) -> Floats | None:
    """inputs (columns, width) times weights (rows, width), on a device: (columns, rows); None if it cannot."""
    lib = ggml()
    backend = lib.ggml_backend_dev_init(address, None)
    if not backend:
        return None
    context = lib.ggml_init(InitParams(1 << 20, None, True))
    a = lib.ggml_new_tensor_2d(context, kind, WIDTH, ROWS)
    b = lib.ggml_new_tensor_2d(context, F32, WIDTH, COLUMNS)
    out, graph = lib.ggml_mul_mat(context, a, b), lib.ggml_new_graph(context)
    lib.ggml_build_forward_expand(graph, out)
    buffer = lib.ggml_backend_alloc_ctx_tensors(context, backend)
    try:
        if not buffer:
            return None
        for tensor, values in ((a, weights), (b, inputs)):
            lib.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        if lib.ggml_backend_graph_compute(backend, graph):
            return None
        product = np.empty((COLUMNS, ROWS), np.float32)
        lib.ggml_backend_tensor_get(out, product.ctypes.data, 0, product.nbytes)
        return product
    finally:
        if buffer:
            lib.ggml_backend_buffer_free(buffer)
        lib.ggml_free(context)
        lib.ggml_backend_free(backend)

"""Image features equal the reference's, and the class-token correction acts only where it must."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pictures
import pytest
import recorded
from stock import stock_features

from pocketllava import BackendError, Bundle, BundleError, InputError, Llava, ModelNotFound
from pocketllava.integrations.llama_cpp import LlavaChatHandler
from pocketllava.vision import image
from pocketllava.vision.class_token import ClassTokenCorrection


@pytest.mark.parametrize(("mmproj", "bound"), [("F16", 1e-3), ("F32", 1e-3), ("Q8_0", 2e-2)])
def test_features_equal_the_recorded_reference(make_bundle: Any, mmproj: str, bound: float) -> None:
    with Llava.load(make_bundle("F16", mmproj).folder) as llava:
        found = llava.image_features(pictures.four()[0])
    assert found.shape == (576, 256)
    assert found.dtype == np.float32
    assert recorded.relative_error(found[recorded.FEATURE_ROWS], recorded.features()) <= bound


def test_stock_features_are_wrong_and_ours_are_corrected(llava: Llava, bundle: Bundle) -> None:
    picture = pictures.four()[0]
    stock = stock_features(llava, image.preprocess(picture, bundle.preprocessing))
    assert recorded.relative_error(stock[recorded.FEATURE_ROWS], recorded.features()) > 0.1
    with llava.session() as session:
        encoder = session.vision
    correction = encoder.correction
    before = correction.corrected, correction.left_alone
    encoder.encode(image.preprocess(picture, bundle.preprocessing))
    assert (correction.corrected, correction.left_alone) == (before[0] + 1, before[1])


class Rows:
    """Embeddings in a ggml tensor on the CPU, as the scheduler's callback sees them."""

    def __init__(self, rows: Any) -> None:
        from pocketllava.llamacpp.library import ggml
        from pocketllava.llamacpp.private import private

        class Params(ctypes.Structure):
            _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

        # A handle of the test's own: the argument types are not those of the package.
        self.lib, self.shape = ctypes.CDLL(ggml()._name), rows.shape
        for name in (
            "ggml_init",
            "ggml_new_tensor_2d",
            "ggml_backend_alloc_ctx_tensors_from_buft",
            "ggml_concat",
        ):
            getattr(self.lib, name).restype = ctypes.c_void_p
        libggml = private("llama_cpp._ggml", "libggml")
        buffer_type = libggml.ggml_backend_dev_buffer_type
        libggml.ggml_backend_dev_by_type.restype = buffer_type.restype = ctypes.c_void_p
        cpu = libggml.ggml_backend_dev_by_type(0)
        self.context = ctypes.c_void_p(self.lib.ggml_init(Params(1 << 16, None, True)))
        width, n = ctypes.c_int64(rows.shape[1]), len(rows)
        parts = [
            ctypes.c_void_p(self.lib.ggml_new_tensor_2d(self.context, 0, width, ctypes.c_int64(k)))
            for k in (n - 1, 1)
        ]
        self.node = self.lib.ggml_concat(self.context, *parts, 1)
        self.buffer = ctypes.c_void_p(
            self.lib.ggml_backend_alloc_ctx_tensors_from_buft(
                self.context, ctypes.c_void_p(buffer_type(ctypes.c_void_p(cpu)))
            )
        )
        self._copy(self.lib.ggml_backend_tensor_set, rows)

    def _copy(self, copy: Any, rows: Any) -> None:
        address, n = ctypes.c_void_p(rows.ctypes.data), ctypes.c_size_t(rows.nbytes)
        copy(ctypes.c_void_p(self.node), address, ctypes.c_size_t(0), n)

    def read(self) -> Any:
        """What the tensor holds now."""
        out = np.empty(self.shape, np.float32)
        self._copy(self.lib.ggml_backend_tensor_get, out)
        return out

    def free(self) -> None:
        """Give the memory back."""
        self.lib.ggml_backend_buffer_free(self.buffer)
        self.lib.ggml_free(self.context)


@pytest.fixture(scope="module")
def embeddings() -> Any:
    """Four patches and a class token, class token first: the right order."""
    return np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)


def run(embeddings: Any, stored: Any) -> tuple[Any, ClassTokenCorrection]:
    """Let the correction see a CONCAT node that holds `stored`."""
    correction = ClassTokenCorrection(embeddings[0], n_patches=4)
    rows = Rows(np.ascontiguousarray(stored))
    correction.begin()
    assert correction.function(rows.node, True, None)
    correction.function(rows.node, False, None)
    found = rows.read()
    try:
        correction.check()
        assert not correction.function(rows.node, True, None)  # once an image
    finally:
        rows.free()
    return found, correction


def test_a_class_token_at_the_end_is_moved_to_the_front(llava: Llava, embeddings: Any) -> None:
    assert llava is not None  # ggml's back ends are registered
    found, correction = run(embeddings, np.roll(embeddings, -1, axis=0))
    assert np.array_equal(found, embeddings)
    assert (correction.corrected, correction.left_alone) == (1, 0)


def test_a_library_that_is_right_is_left_alone(llava: Llava, embeddings: Any) -> None:
    assert llava is not None
    found, correction = run(embeddings, embeddings)
    assert np.array_equal(found, embeddings)
    assert (correction.corrected, correction.left_alone) == (0, 1)


def test_an_unknown_order_is_an_error(llava: Llava, embeddings: Any) -> None:
    assert llava is not None
    with pytest.raises(BackendError, match="no class token at either end"):
        run(embeddings, np.zeros_like(embeddings))


def test_the_embeddings_at_the_image_positions_are_the_features(llava: Llava) -> None:
    trace = llava.trace(pictures.four()[1], "What is it?")
    first, last = trace.image_positions
    assert last - first + 1 == 576
    assert trace.embeddings_match
    assert trace.max_difference < 1e-5
    assert trace.class_token_corrected
    assert trace.token_ids[first : last + 1] == (recorded.image_token(),) * 576
    assert recorded.image_token() not in trace.token_ids[:first] + trace.token_ids[last + 1 :]
    assert (trace.pixel_shape, trace.grid, trace.vision_shape) == ((3, 336, 336), (24, 24), (576, 64))


def test_pixels_of_another_size_are_refused(llava: Llava) -> None:
    with llava.session() as session:
        encoder = session.vision
    with pytest.raises(InputError, match=r"pixels: uint8 \(10, 10, 3\), expected uint8 \(336, 336, 3\)"):
        encoder.encode(np.zeros((10, 10, 3), np.uint8))


def test_files_that_are_no_mmproj(bundle: Bundle, make_bundle: Any, tmp_path: Any) -> None:
    from llama_cpp import Llama

    llama = Llama(str(bundle.model), n_ctx=256, n_threads=1, verbose=False)
    with pytest.raises(BundleError, match="it is a text model, not an mmproj"):
        LlavaChatHandler(bundle.model).session(llama)
    other = make_bundle(hidden=512, heads=8, kv_heads=8, layers=1, ffn=256)
    alone = tmp_path / "other.gguf"
    alone.write_bytes(other.mmproj.read_bytes())
    with pytest.raises(BundleError, match="projects to width 512, the text model has 256"):
        LlavaChatHandler(alone).session(llama)
    llama.close()
    with pytest.raises(ModelNotFound, match="found nothing"):
        LlavaChatHandler(tmp_path / "none.gguf")

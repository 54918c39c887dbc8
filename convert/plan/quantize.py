"""The type of each tensor, and rows -> that type's bytes with ggml's own code.

The mixes follow llama.cpp's llama_tensor_get_type_impl and tensor_type_fallback (src/llama-quant.cpp),
with and without an importance matrix; tests hold every one of them to llama_model_quantize's bytes. Knows GGUF
tensor names and ggml types; nothing of files or checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from gguf import LlamaFileType as F

from pocketllava.errors import ConvertError, UnsupportedOption
from pocketllava.llamacpp.quantization import dequantize_rows, is_finite, quantize_rows

Floats = npt.NDArray[np.float32]

TEXT_TYPES: dict[str, tuple[T, F]] = {  # --quant: the default type of a matrix, and general.file_type
    "F32": (T.F32, F.ALL_F32),
    "F16": (T.F16, F.MOSTLY_F16),
    "BF16": (T.BF16, F.MOSTLY_BF16),
    "Q8_0": (T.Q8_0, F.MOSTLY_Q8_0),
    "Q6_K": (T.Q6_K, F.MOSTLY_Q6_K),
    "Q5_K_M": (T.Q5_K, F.MOSTLY_Q5_K_M),
    "Q5_K_S": (T.Q5_K, F.MOSTLY_Q5_K_S),
    "Q4_K_M": (T.Q4_K, F.MOSTLY_Q4_K_M),
    "Q4_K_S": (T.Q4_K, F.MOSTLY_Q4_K_S),
    "Q3_K_L": (T.Q3_K, F.MOSTLY_Q3_K_L),
    "Q3_K_M": (T.Q3_K, F.MOSTLY_Q3_K_M),
    "Q3_K_S": (T.Q3_K, F.MOSTLY_Q3_K_S),
    "Q2_K": (T.Q2_K, F.MOSTLY_Q2_K),
    "Q5_0": (T.Q5_0, F.MOSTLY_Q5_0),
    "Q5_1": (T.Q5_1, F.MOSTLY_Q5_1),
    "Q4_0": (T.Q4_0, F.MOSTLY_Q4_0),
    "Q4_1": (T.Q4_1, F.MOSTLY_Q4_1),
    "IQ4_NL": (T.IQ4_NL, F.MOSTLY_IQ4_NL),
    "IQ4_XS": (T.IQ4_XS, F.MOSTLY_IQ4_XS),
    "IQ3_M": (T.IQ3_S, F.MOSTLY_IQ3_M),
    "IQ3_S": (T.IQ3_S, F.MOSTLY_IQ3_S),
    "IQ3_XS": (T.IQ3_S, F.MOSTLY_IQ3_XS),
    "IQ3_XXS": (T.IQ3_XXS, F.MOSTLY_IQ3_XXS),
    "IQ2_M": (T.IQ2_S, F.MOSTLY_IQ2_M),
    "IQ2_S": (T.IQ2_XS, F.MOSTLY_IQ2_S),
    "IQ2_XS": (T.IQ2_XS, F.MOSTLY_IQ2_XS),
    "IQ2_XXS": (T.IQ2_XXS, F.MOSTLY_IQ2_XXS),
}
LOWEST = ("IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS")  # their output matrix is Q5_K
ATTN_OUTPUT = {"Q2_K": T.Q3_K, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K, "IQ3_XXS": T.IQ3_S, "IQ3_M": T.Q4_K}
EIGHTH_FFN_DOWN: dict[str, tuple[T | None, T | None]] = {  # first layers' ffn_down without, with a matrix
    "IQ4_NL": (T.Q5_K, None),
    "IQ4_XS": (T.Q5_K, None),
    "Q4_0": (None, T.Q4_1),
    "Q5_0": (None, T.Q5_1),
    "IQ3_M": (T.Q4_K, T.Q4_K),
}
NEED_MATRIX = tuple(name for name in TEXT_TYPES if name.startswith(("IQ2", "IQ3")))
MMPROJ_TYPES: dict[str, tuple[T, F]] = {name: TEXT_TYPES[name] for name in ("F32", "F16", "BF16", "Q8_0")}
UNQUANTIZED = (T.F32, T.F16, T.BF16)
FALLBACK = {  # for rows that the type's block of 256 does not divide
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
    **dict.fromkeys((T.IQ4_XS, T.IQ3_S, T.IQ3_XXS, T.IQ2_S, T.IQ2_XS, T.IQ2_XXS), T.IQ4_NL),
}
MAX_F16 = 65504.0
# Largest ||x - q(x)|| / ||x|| that a tensor may show: about twice what normally distributed rows do.
ERROR_BOUNDS = {
    T.F32: 0.0,
    T.F16: 2**-11,
    T.BF16: 2**-8,
    T.Q8_0: 0.02,
    T.Q6_K: 0.06,
    T.Q5_K: 0.12,
    T.Q5_0: 0.12,
    T.Q5_1: 0.12,
    T.Q4_K: 0.2,
    T.Q4_0: 0.25,
    T.Q4_1: 0.25,
    T.IQ4_NL: 0.25,
    T.IQ4_XS: 0.25,
    T.Q3_K: 0.4,
    T.Q2_K: 0.6,
    T.IQ3_S: 0.45,
    T.IQ3_XXS: 0.5,
    **dict.fromkeys((T.IQ2_S, T.IQ2_XS, T.IQ2_XXS), 0.85),
}


@dataclass(frozen=True)
class Mix:
    """A text file type and the model properties that its mix of tensor types depends on."""

    quant: str
    n_layer: int
    n_gqa: int
    tied: bool
    has_matrix: bool = False

    def type_of(self, name: str, shape: tuple[int, ...]) -> T:
        """The type of one tensor, by its GGUF name and shape (rows first)."""
        base = TEXT_TYPES[self.quant][0]
        if len(shape) < 2 or name.endswith("_norm.weight"):
            return T.F32
        chosen = base if base in UNQUANTIZED else self._mixed(name, base, shape[-1])
        return fitting(chosen, shape[-1])

    def _mixed(self, name: str, base: T, n_per_row: int) -> T:
        part = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if part == "output" or (self.tied and part == "token_embd"):
            if n_per_row % GGML_QUANT_SIZES[base][0]:
                return T.Q8_0
            if self.quant in LOWEST:
                return T.Q5_K
            return base if base is T.Q8_0 else T.Q6_K
        if self.quant in LOWEST:
            return self._lowest(part, base, _layer(name))
        return self._low(part, base, _layer(name))

    def _lowest(self, part: str, base: T, layer: int) -> T:
        """IQ2 types and IQ3_XXS's token embedding: a little more where it matters most."""
        more = self.quant in ("IQ2_S", "IQ2_M")
        if self.quant == "IQ3_XXS":
            return T.IQ3_S if part == "token_embd" else self._low(part, base, layer)
        if part == "attn_v" and self.n_gqa >= 4:
            return T.Q4_K
        if part == "attn_output":
            return T.IQ3_S if more else base
        if part in ("token_embd", "attn_v") or (part == "ffn_down" and layer < self.n_layer // 8):
            return T.IQ3_S if more else T.Q2_K
        return base

    def _low(self, part: str, base: T, layer: int) -> T:
        if part == "attn_v":
            return self._attn_v(base, layer)
        if part == "ffn_down":
            return self._ffn_down(base, layer)
        if part == "attn_output":
            return ATTN_OUTPUT.get(self.quant, base)
        if part in ("attn_q", "attn_k"):
            return {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S}.get(self.quant, base)
        middle = self.n_layer // 8 <= layer < 7 * self.n_layer // 8
        if part in ("ffn_gate", "ffn_up") and self.quant == "IQ3_XS" and middle:
            return T.IQ3_XXS
        return base

    def _attn_v(self, base: T, layer: int) -> T:
        quant, grouped = self.quant, self.n_gqa >= 4
        chosen = base
        if quant == "Q2_K":
            chosen = T.Q4_K if grouped else T.Q3_K
        elif quant == "IQ3_M" or (quant in ("IQ3_XXS", "IQ3_XS", "IQ3_S") and grouped):
            chosen = T.Q4_K
        elif quant == "Q3_K_M":
            chosen = T.Q5_K if layer < 2 else T.Q4_K
        elif quant == "Q3_K_L" or (quant in ("IQ4_NL", "IQ4_XS") and grouped):
            chosen = T.Q5_K
        elif quant in ("Q4_K_M", "Q5_K_M") and self._use_more_bits(layer):
            chosen = T.Q6_K
        elif quant == "Q4_K_S" and layer < 4:
            chosen = T.Q5_K
        return self._for_70b(chosen)

    def _for_70b(self, chosen: T) -> T:
        """llama.cpp calls 80 layers of grouped heads a 70B and spends one step more on attn_v."""
        if self.n_layer == 80 and self.n_gqa > 1 and chosen in (T.Q3_K, T.Q4_K):
            return T.Q5_K
        return chosen

    def _ffn_down(self, base: T, layer: int) -> T:
        quant, eighth = self.quant, layer < self.n_layer // 8
        if quant == "Q2_K":
            return T.Q3_K
        if quant == "Q3_K_M":
            return T.Q5_K if layer < self.n_layer // 16 else T.Q4_K
        if quant == "Q3_K_L":
            return T.Q5_K
        if quant in ("Q4_K_M", "Q5_K_M") and self._use_more_bits(layer):
            return T.Q6_K
        if quant == "Q4_K_S" and eighth:
            return T.Q5_K
        if quant in EIGHTH_FFN_DOWN and eighth:
            without, with_matrix = EIGHTH_FFN_DOWN[quant]
            return (with_matrix if self.has_matrix else without) or base
        return base

    def _use_more_bits(self, layer: int) -> bool:
        n = self.n_layer
        return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else 0


def fitting(chosen: T, n_per_row: int) -> T:
    """The type itself, its fallback for rows that its block does not divide, or F16."""
    if n_per_row % GGML_QUANT_SIZES[chosen][0]:
        chosen = FALLBACK.get(chosen, chosen)
    return T.F16 if n_per_row % GGML_QUANT_SIZES[chosen][0] else chosen


def known(name: str, types: dict[str, tuple[T, F]], option: str) -> str:
    """The type's name in upper case. Raises UnsupportedOption, which lists the known ones."""
    if name.upper() not in types:
        raise UnsupportedOption(f"{option}: found {name!r}, expected one of {', '.join(types)}")
    return name.upper()


def n_bytes(kind: T, shape: tuple[int, ...]) -> int:
    """Size of a tensor of this type and shape."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // int(block) * int(block_bytes)


def quantize(rows: Floats, kind: T, name: str, importance: Floats | None = None) -> bytes:
    """(n_rows, n_per_row) float32 -> that type's bytes, as ggml_quantize_chunk makes them (releases the GIL).

    importance: (n_per_row,) float32, how much an error in each column counts (Q8_0 does not ask).
    Raises ConvertError for values that the type cannot hold (NaN, infinity, beyond F16's range).
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    largest = float(np.maximum(-rows.min(initial=0.0), rows.max(initial=0.0)))  # NaN survives all three
    if not np.isfinite(largest):
        raise ConvertError(_not_finite(name))
    if kind is T.F16 and largest > MAX_F16:
        raise ConvertError(f"tensor {name}: holds {largest:g}, F16 ends at {MAX_F16:g}; use BF16 or F32")
    if kind is T.F32:
        return rows.tobytes()
    blocks = quantize_rows(rows, int(kind), n_bytes(kind, rows.shape), importance)
    if blocks is None:
        raise ConvertError(f"tensor {name}: ggml wrote another size than {kind.name} has; report this")
    if not is_finite(blocks, int(kind)):
        raise ConvertError(
            f"tensor {name}: its values up to {largest:g} do not fit {kind.name}; use BF16 or F32"
        )
    return blocks.tobytes()


def checked_copy(data: bytes, kind: T, name: str) -> bytes:
    """Bytes that are of that type already. Raises ConvertError if ggml finds NaN or infinity in them."""
    if not is_finite(data, int(kind)):
        raise ConvertError(_not_finite(name))
    return data


def dequantize(data: bytes, kind: T, n_values: int) -> Floats:
    """That type's bytes -> (n_values,) float32, by ggml's own conversion."""
    raw = np.frombuffer(data, np.uint8)
    return raw.view(np.float32) if kind is T.F32 else dequantize_rows(raw, int(kind), n_values)


def _not_finite(name: str) -> str:
    return f"tensor {name}: holds NaN or infinite values; the checkpoint is damaged or diverged"

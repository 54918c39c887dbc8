"""How far Llama 3.1 stretches each rotary frequency: config.json's rope_type "llama3" -> divisors.

Knows the formula and its float32 steps as llama.cpp's converter takes them (conversion/llama.py, which uses
torch: there a number over a tensor is the tensor's reciprocal, then a product); no tensors, no GGUF.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pocketllava.errors import ConvertError

DEFAULTS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192.0,
}
ONE = np.float32(1)


def llama3_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
    """(head_dim / 2) divisors of the rotary frequencies. Raises ConvertError for numbers that make none."""
    factor, low, high, old = (_positive(rope, name, default) for name, default in DEFAULTS.items())
    if low == high:
        raise ConvertError(f"config.json: low_freq_factor and high_freq_factor are both {low}, expected two")
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)
    return tuple(_factor(ONE / power, factor, low, high, old) for power in powers)


def _factor(freq: np.float32, factor: float, low: float, high: float, old: float) -> float:
    """1 for short waves, `factor` for long ones, and in between a smooth passage."""
    wavelength = (ONE / freq) * np.float32(2 * math.pi)
    if wavelength < old / high:
        return 1.0
    if wavelength > old / low:
        return factor
    turns = (ONE / wavelength) * np.float32(old)
    smooth = (turns - np.float32(low)) / np.float32(high - low)
    return float(ONE / ((ONE - smooth) / np.float32(factor) + smooth))


def _positive(rope: Mapping[str, Any], name: str, default: float) -> float:
    value = rope.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConvertError(f"config.json: rope_scaling's {name} is {value!r}, expected a positive number")
    return float(value)

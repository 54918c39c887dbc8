"""What vision_feature_layer means: one index into a tower's hidden states, or several side by side.

Knows transformers' counting (n_layer + 1 hidden states, negative from the end); nothing else.
"""

from __future__ import annotations

from typing import Any

from pocketllava.errors import UnsupportedCheckpoint


def feature_layers(given: Any, n_layer: int) -> tuple[int, ...]:
    """Indices into hidden_states in the checkpoint's order: [-2, -5] of 24 layers is (23, 20).

    Raises UnsupportedCheckpoint.
    """
    listed = given if isinstance(given, list) else [given]
    if not listed or any(not isinstance(n, int) or isinstance(n, bool) for n in listed):
        raise UnsupportedCheckpoint(
            f"config.json: vision_feature_layer {given!r}, expected a whole number or a list of them"
        )
    layers = tuple(n if n >= 0 else n_layer + 1 + n for n in listed)
    if min(layers) < 0 or not 1 <= max(layers) <= n_layer:
        raise UnsupportedCheckpoint(
            f"config.json: vision_feature_layer is {given!r}, expected one of {n_layer} blocks"
        )
    if len(set(layers)) != len(layers):
        raise UnsupportedCheckpoint(
            f"config.json: vision_feature_layer {given!r} names a layer twice, expected each once"
            " (llama.cpp stacks each once)"
        )
    return layers

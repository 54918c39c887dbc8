"""What one device computed is not served on another through a shared cache folder.

Needs a device besides the CPU: `make devices` has one, or see tests/devices/machine.py. Skipped elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from test_cache import logits

from pocketllava import Bundle, Llava, Options
from pocketllava.llamacpp.devices import gpus

pytestmark = pytest.mark.skipif(not gpus(), reason="no device but the CPU")
DEVICES = {"device": -1, "cpu": 0}  # n_gpu_layers
ORDERS = [("device", "cpu"), ("cpu", "device")]
PICTURE = pictures.four()[0]
ONE = Options(max_tokens=1)


def features(bundle: Bundle, layers: int, folder: Path) -> Any:
    """Image features, (n_patches, n_embd)."""
    with Llava.load(bundle.folder, n_gpu_layers=layers, cache_dir=folder) as llava:
        return llava.image_features(PICTURE)


def evaluated(bundle: Bundle, layers: int, folder: Path) -> Any:
    """Logits after a question about the picture, whose prefix is kept on disk."""
    with Llava.load(bundle.folder, n_gpu_layers=layers, cache_dir=folder, keep_prefixes=True) as llava:
        llava.ask(PICTURE, "What is it?", options=ONE)
        return logits(llava)


@pytest.mark.parametrize("compute", [features, evaluated])
@pytest.mark.parametrize(("first", "second"), ORDERS)
def test_devices_that_share_a_folder_give_their_own_bits(
    bundle: Bundle, tmp_path: Path, first: str, second: str, compute: Any
) -> None:
    alone = compute(bundle, DEVICES[second], tmp_path / "own")
    compute(bundle, DEVICES[first], tmp_path / "shared")
    assert np.array_equal(compute(bundle, DEVICES[second], tmp_path / "shared"), alone)

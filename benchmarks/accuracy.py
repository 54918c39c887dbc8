"""Accuracy of the demo model on held-out drawn scenes: transformers, every type, Q8_0 mmproj, the stock handler.

    python benchmarks/accuracy.py OUT [--questions 1000]

Needs the extra `reference` (torch, transformers) and, for the plot, matplotlib. Writes OUT/accuracy.json
(an interrupted run goes on from it), OUT/accuracy.md and OUT/accuracy.png. All answers are greedy.
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from pocketllava import Answer, Bundle, Llava, Message, Options, Timings
from pocketllava.convert import convert
from pocketllava.measure.accuracy import Result, run, scene_items, summary

CHECKPOINT = Path(str(files("pocketllava.models.demo") / "checkpoint"))
TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
STOCK_TYPES = ("F16", "Q4_K_M")
NO_TIMINGS = Timings()


class TransformersAnswers:
    """The reference: transformers in float32."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.torch, self.processor = torch, AutoProcessor.from_pretrained(CHECKPOINT)
        self.model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()

    def chat(self, messages: Sequence[Message], *, options: Options | None = None) -> Answer:
        """Greedy, through the checkpoint's own processor."""
        assert options
        turns = [
            {
                "role": m.role,
                "content": [{"type": "image"}] * len(m.images) + [{"type": "text", "text": m.text}],
            }
            for m in messages
        ]
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        images = [image for m in messages for image in m.images]
        inputs = self.processor(images=images, text=prompt, return_tensors="pt")
        with self.torch.inference_mode():
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=options.max_tokens)
        new = ids[0, inputs["input_ids"].shape[1] :]
        return Answer(self.processor.tokenizer.decode(new, skip_special_tokens=True), (), NO_TIMINGS, "stop")


class StockAnswers:
    """llama-cpp-python's own LLaVA handler on the same two files."""

    def __init__(self, bundle: Bundle) -> None:
        from llama_cpp import Llama
        from llama_cpp.llama_chat_format import Llava15ChatHandler

        handler = Llava15ChatHandler(clip_model_path=str(bundle.mmproj), verbose=False)
        self.llama = Llama(str(bundle.model), chat_handler=handler, n_ctx=512, n_threads=2, verbose=False)

    def chat(self, messages: Sequence[Message], *, options: Options | None = None) -> Answer:
        """Greedy, with the handler's own prompt and no repeat penalty."""
        assert options
        turns: Any = [{"role": m.role, "content": _parts(m) if m.images else m.text} for m in messages]
        done: Any = self.llama.create_chat_completion(
            turns, max_tokens=options.max_tokens, temperature=0.0, repeat_penalty=1.0
        )
        return Answer(done["choices"][0]["message"]["content"], (), NO_TIMINGS, "stop")


def _parts(message: Message) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for image in message.images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")  # type: ignore[union-attr]
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": message.text}]


def evaluated(model: Any, n: int) -> list[Result]:
    """All results of one model."""
    return list(run(model, scene_items(n), {}))


def rows(out: Path, n: int) -> dict[str, list[Result]]:
    """Every row of the table, those that are done already from accuracy.json."""
    kept = out / "accuracy.json"
    stored = json.loads(kept.read_text()) if kept.exists() else {}
    found = {
        name: [Result(**{**r, "expected": tuple(r["expected"])}) for r in results]
        for name, results in stored.items()
    }

    def add(name: str, make: Any) -> None:
        if len(found.get(name, ())) != n:
            with make() as model:
                found[name] = evaluated(model, n)
            kept.write_text(
                json.dumps({k: [asdict(r) for r in v] for k, v in found.items()}, ensure_ascii=False)
            )
            print(name, summary(found[name])["accuracy"], flush=True)

    add("transformers, float32", lambda: _closing(TransformersAnswers()))
    for quant in TYPES:
        bundle = _bundle(out, quant, "F16")
        add(f"{quant} + F16 mmproj", lambda b=bundle: Llava.load(b.folder))
    for quant in ("F16", "Q4_K_M"):
        bundle = _bundle(out, quant, "Q8_0")
        add(f"{quant} + Q8_0 mmproj", lambda b=bundle: Llava.load(b.folder))
    bundle = _bundle(out, "F16", "F16")
    add("no class-token correction, F16 + F16 mmproj", lambda: _uncorrected(bundle))
    for quant in STOCK_TYPES:
        bundle = _bundle(out, quant, "F16")
        add(f"stock handler, {quant} + F16 mmproj", lambda b=bundle: _closing(StockAnswers(b)))
    return found


@contextmanager
def _uncorrected(bundle: Bundle) -> Iterator[Llava]:
    """pocketllava's prompt on libmtmd's image features as they are: what the class token's place costs."""
    with Llava.load(bundle.folder) as llava:
        with llava.session() as session:
            session.vision.correction.enabled = False
        yield llava


@contextmanager
def _closing(model: Any) -> Any:
    yield model


def _bundle(out: Path, quant: str, mmproj: str) -> Bundle:
    folder = out / f"{quant}-{mmproj}"
    return Bundle.open(folder) if folder.exists() else convert(CHECKPOINT, folder, quant=quant, mmproj=mmproj)


def table(out: Path, found: dict[str, list[Result]]) -> str:
    """Markdown: accuracy, answers equal to transformers', megabytes."""
    reference = [r.answer for r in found["transformers, float32"]]
    lines = ["| model | MB | accuracy | answers equal transformers' | worst kind |", "|---|---|---|---|---|"]
    for name, results in found.items():
        s = summary(results)
        same = sum(a == r.answer.strip() for a, r in zip(reference, results, strict=True)) / len(results)
        worst = min(s["by_type"], key=s["by_type"].get)
        mega = f"{_megabytes(out, name):.1f}"
        kind = f"{worst} {s['by_type'][worst]:.1%}"
        lines.append(f"| {name} | {mega} | {s['accuracy']:.1%} | {same:.1%} | {kind} |")
    return "\n".join(lines)


def _megabytes(out: Path, name: str) -> float:
    if name.startswith("transformers"):
        return (CHECKPOINT / "model.safetensors").stat().st_size / 1e6
    quant, mmproj = name.rpartition(", ")[2].removesuffix(" mmproj").split(" + ")
    folder = out / f"{quant}-{mmproj}"
    return sum((folder / f).stat().st_size for f in ("model.gguf", "mmproj.gguf")) / 1e6


def plot(out: Path, found: dict[str, list[Result]]) -> None:
    """Accuracy against size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (close, whole) = pyplot.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    for name, results in found.items():
        stock, reference = name.startswith(("stock", "no ")), name.startswith("transformers")
        color = "tab:red" if stock else "tab:green" if reference else "tab:blue"
        x, y = _megabytes(out, name), 100 * summary(results)["accuracy"]
        label = name.removesuffix(" + F16 mmproj").replace(" mmproj", "").replace(", ", ",\n")
        for axes in (whole, *([] if stock else [close])):
            axes.scatter(x, y, color=color, marker="x" if stock else "o")
            if stock or axes is close:
                turn = 0 if stock else 50
                axes.annotate(
                    label, (x, y), textcoords="offset points", xytext=(3, 5), fontsize=7, rotation=turn
                )
    close.set_title("pocketllava and transformers", fontsize=9)
    whole.set_title("and without the corrections", fontsize=9)
    whole.set_ylim(0, 102)
    bottom, top = close.get_ylim()
    close.set_ylim(bottom, top + 0.7 * (top - bottom))
    for axes in (close, whole):
        left, right = axes.get_xlim()
        axes.set_xlim(left, right + 0.2 * (right - left))
        axes.set_xlabel("size of both files, MB")
        axes.grid(alpha=0.3)
    close.set_ylabel("accuracy on held-out questions, %")
    figure.savefig(out / "accuracy.png", dpi=110)


def main() -> None:
    """Fill in what is missing, then write the table and the plot."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=Path)
    ap.add_argument("--questions", type=int, default=1000)
    a = ap.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    found = rows(a.out, a.questions)
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("pocketllava", "llama-cpp-python", "transformers")
    )
    text = f"{a.questions} held-out questions; {versions}\n\n{table(a.out, found)}\n"
    (a.out / "accuracy.md").write_text(text, "utf-8")
    print(text)
    plot(a.out, found)


if __name__ == "__main__":
    main()

"""What an importance matrix does to the demo model: KL divergence and accuracy without, from text, from pictures.

    python benchmarks/imatrix.py OUT [--questions 300] [--positions 60]

Matrices are made from the F16 bundle: `pictures` from 640 drawn scenes, a question each, and its answers,
`text` from as many positions of questions and answers alone. KL divergence (nats, F16's next-token distribution
against the quantized model's) is the mean over the positions of F16's own greedy answers to held-out
questions. Writes OUT/imatrix.json (an interrupted run goes on from it) and OUT/imatrix.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pocketllava import Bundle, Llava, Options
from pocketllava.convert import convert
from pocketllava.measure.accuracy import Item, run, scene_items, summary
from pocketllava.measure.importance import CHUNK, collect
from pocketllava.models.demo import scenes

CHECKPOINT = Path(str(files("pocketllava.models.demo") / "checkpoint"))
FIRST_SCENE, N_SCENES = 20_000_000, 640  # neither trained on nor held out
KINDS: dict[str, tuple[str, ...]] = {
    "none": ("Q4_0", "Q3_K_S", "Q2_K"),
    "text": ("Q4_0", "Q3_K_S", "Q2_K", "IQ3_XXS", "IQ2_M", "IQ2_XXS"),
    "pictures": ("Q4_0", "Q3_K_S", "Q2_K", "IQ3_XXS", "IQ2_M", "IQ2_XXS"),
}


def matrices(out: Path, bundle: Bundle) -> dict[str, Path | None]:
    """Compute both, once."""
    folder, text = out / "scenes", out / "text.txt"
    folder.mkdir(exist_ok=True)
    lines, asked = [], []
    for n in range(N_SCENES):
        scene = scenes.scene(FIRST_SCENE + n)
        scene.draw().save(folder / f"{n:03}.png")
        pairs = scenes.questions(scene)
        asked.append(pairs[n % len(pairs)].turns[0].question)
        lines += [f"{t.question} {t.answer}" for qa in pairs for t in qa.turns]
    text.write_text("\n".join(lines), "utf-8")
    positions = 0
    found: dict[str, Path | None] = {"none": None}
    for name, source in (("pictures", folder), ("text", text)):
        found[name] = path = out / f"{name}.gguf"
        if not path.exists():
            with Llava.load(bundle.folder) as llava:
                limit = max(1, positions // CHUNK) if name == "text" else None
                done = collect(llava, source, path, questions=asked, limit=limit)
            positions = done.positions
            print(name, done, flush=True)
    return found


def distributions(llava: Llava, item: Item, answer: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """log p of every next token after the prompt and after each token of an answer, (n, n_vocab)."""
    rows = []
    with llava.session() as session:
        session.prefill(item.messages)
        for token in (*answer, None):
            wide = session.text.logits().astype(np.float64)
            wide -= wide.max()
            rows.append(wide - np.log(np.exp(wide).sum()))
            if token is not None:
                session.text.decode_tokens([token])
    return np.array(rows)


def reference(llava: Llava, items: list[Item]) -> Iterator[tuple[tuple[int, ...], npt.NDArray[np.float64]]]:
    """F16's greedy answers and its distributions along them."""
    for item in items:
        answer = llava.chat(item.messages, options=Options(max_tokens=48)).token_ids
        yield answer, distributions(llava, item, answer)


def divergence(llava: Llava, items: list[Item], expected: list[Any]) -> float:
    """Mean KL(F16 || this) in nats."""
    sums, n = 0.0, 0
    for item, (answer, log_p) in zip(items, expected, strict=True):
        log_q = distributions(llava, item, answer)
        sums += float((np.exp(log_p) * (log_p - log_q)).sum())
        n += len(log_p)
    return sums / n


def main() -> None:
    """Fill in what is missing, then write the table."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=Path)
    ap.add_argument("--questions", type=int, default=300)
    ap.add_argument("--positions", type=int, default=60, help="questions whose answers are compared for KL")
    a = ap.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    kept = a.out / "imatrix.json"
    rows: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    f16 = _bundle(a.out / "F16", "F16", None)
    found = matrices(a.out, f16)
    items = list(scene_items(a.questions))
    compared = items[: a.positions]
    with Llava.load(f16.folder) as llava:
        expected = list(reference(llava, compared))
    plan = [("F16", "none"), *((quant, kind) for kind, quants in KINDS.items() for quant in quants)]
    for quant, kind in plan:
        name = f"{quant} {kind}"
        if name in rows:
            continue
        bundle = f16 if quant == "F16" else _bundle(a.out / name.replace(" ", "-"), quant, found[kind])
        with Llava.load(bundle.folder) as llava:
            kl = divergence(llava, compared, expected)
            accuracy = summary(list(run(llava, items, {})))["accuracy"]
        rows[name] = {"kl": kl, "accuracy": accuracy, "mb": bundle.model.stat().st_size / 1e6}
        kept.write_text(json.dumps(rows, indent=1))
        print(name, rows[name], flush=True)
    text = table(rows, a.questions)
    (a.out / "imatrix.md").write_text(text, "utf-8")
    print(text)


def _bundle(folder: Path, quant: str, matrix: Path | None) -> Bundle:
    return (
        Bundle.open(folder) if folder.exists() else convert(CHECKPOINT, folder, quant=quant, imatrix=matrix)
    )


def table(rows: dict[str, Any], n: int) -> str:
    """Markdown: KL and accuracy by type, a column for each matrix."""
    lines = [
        f"{n} held-out questions; F16 answers {rows['F16 none']['accuracy']:.1%} of them",
        "",
        "| type | MB | KL: no matrix | text | pictures | accuracy: no matrix | text | pictures |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for quant in KINDS["pictures"]:
        cells = [rows.get(f"{quant} {kind}") for kind in KINDS]
        kl = " | ".join(f"{c['kl']:.3g}" if c else "-" for c in cells)
        accuracy = " | ".join(f"{c['accuracy']:.1%}" if c else "-" for c in cells)
        lines.append(f"| {quant} | {rows[f'{quant} pictures']['mb']:.1f} | {kl} | {accuracy} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Accuracy of the demo model with fewer image tokens: SCOPE beside top attention, random patches and 2 x 2 means.

    python benchmarks/image_tokens.py OUT [--questions 1000]

Writes OUT/image_tokens.json (an interrupted run goes on from it), OUT/image_tokens.md and, where matplotlib is
installed, OUT/image_tokens.png. F16 files, greedy answers; the demo's pictures take 36 tokens.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from pocketllava import Bundle, Llava
from pocketllava.convert import convert
from pocketllava.measure.accuracy import run, scene_items, summary

CHECKPOINT = Path(str(files("pocketllava.models.demo") / "checkpoint"))
ALL, GRID = 36, 6
COUNTS = (18, 12, 9, 6)
SEED = 0
Ranked = Callable[..., tuple[Any, Any]]


def by_scope(encode_ranked: Ranked, _tower: Any) -> Ranked:
    """What pocketllava does."""
    return encode_ranked


def by_attention(encode_ranked: Ranked, tower: Any) -> Ranked:
    """The patches that get most of the class token's attention (FasterVLM)."""

    def ranked(*args: Any) -> tuple[Any, Any]:
        features, _ = encode_ranked(*args)
        return features, np.argsort(-tower.attention(), kind="stable").astype(np.int16)

    return ranked


def by_chance(encode_ranked: Ranked, _tower: Any) -> Ranked:
    """Other random patches for every picture."""
    rng = np.random.default_rng(SEED)

    def ranked(*args: Any) -> tuple[Any, Any]:
        features, _ = encode_ranked(*args)
        return features, rng.permutation(ALL).astype(np.int16)

    return ranked


def by_means(encode_ranked: Ranked, _tower: Any) -> Ranked:
    """The means of 2 x 2 patches' features, nine of them."""

    def ranked(*args: Any) -> tuple[Any, Any]:
        features, order = encode_ranked(*args)
        half = GRID // 2
        means = features.reshape(half, 2, half, 2, -1).mean(axis=(1, 3)).reshape(half * half, -1)
        corners = np.arange(ALL).reshape(GRID, GRID)[::2, ::2].ravel()
        pooled = features.copy()
        pooled[corners] = means
        rest = np.setdiff1d(order, corners)
        return pooled, np.concatenate([corners, rest]).astype(np.int16)

    return ranked


METHODS: dict[str, tuple[Callable[[Ranked, Any], Ranked], tuple[int, ...]]] = {
    "SCOPE": (by_scope, COUNTS),
    "top attention": (by_attention, COUNTS),
    "random": (by_chance, COUNTS),
    "2 x 2 means": (by_means, (9,)),
}


def accuracy(bundle: Bundle, n_questions: int, method: str, image_tokens: int | None) -> float:
    """The share of right answers."""
    with Llava.load(bundle.folder, image_tokens=image_tokens) as llava:
        with llava.session() as session:
            vision: Any = session.vision
            vision.encode_ranked = METHODS[method][0](vision.encode_ranked, vision.correction)
        results = list(run(llava, scene_items(n_questions), {}))
    return float(summary(results)["accuracy"])


def measured(out: Path, n_questions: int) -> dict[str, float]:
    """Accuracy by "method, tokens"; those that are done already from image_tokens.json."""
    kept = out / "image_tokens.json"
    shares: dict[str, float] = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    folder = out / "F16"
    bundle = Bundle.open(folder) if folder.exists() else convert(CHECKPOINT, folder, quant="F16")
    wanted = [("all", "SCOPE", None)]
    wanted += [(f"{method}, {n}", method, n) for method, (_, counts) in METHODS.items() for n in counts]
    for name, method, n in wanted:
        if name not in shares:
            shares[name] = accuracy(bundle, n_questions, method, n)
            kept.write_text(json.dumps(shares), "utf-8")
            print(f"{name}: {shares[name]:.1%}", flush=True)
    return shares


def table(shares: dict[str, float]) -> str:
    """Markdown: a row a method, a column a number of tokens."""
    lines = [f"| tokens | {ALL} | " + " | ".join(map(str, COUNTS)) + " |", "|---" * (2 + len(COUNTS)) + "|"]
    for method in METHODS:
        values = [shares.get(f"{method}, {n}") for n in COUNTS]
        cells = [f"{100 * share:.1f}" if share is not None else "" for share in (shares["all"], *values)]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(out: Path, shares: dict[str, float]) -> None:
    """Accuracy against the number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for method, (_, counts) in METHODS.items():
        points = [(ALL, shares["all"]), *((n, shares[f"{method}, {n}"]) for n in counts)]
        axes.plot([n for n, _ in points], [100 * share for _, share in points], marker="o", label=method)
    axes.set_xlabel("image tokens")
    axes.set_ylabel("accuracy on held-out questions, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "image_tokens.png", dpi=110)


def main() -> None:
    """Fill in what is missing, then write the table and the plot."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out", type=Path)
    ap.add_argument("--questions", type=int, default=1000)
    a = ap.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    shares = measured(a.out, a.questions)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("pocketllava", "llama-cpp-python"))
    text = f"{a.questions} held-out questions, accuracy in %; {versions}\n\n{table(shares)}\n"
    (a.out / "image_tokens.md").write_text(text, "utf-8")
    print(text)
    try:
        plot(a.out, shares)
    except ImportError:
        print("matplotlib is not installed: no plot")


if __name__ == "__main__":
    main()

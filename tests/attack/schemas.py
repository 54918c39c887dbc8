"""Attacks structured output: random schemas, held to by random logits, their answers validated with jsonschema.

.venv/bin/python tests/attack/schemas.py [SEED [CASES]]

A child process runs them, so that a signal or a hang counts as one and names its case.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import json_schemas
import jsonschema
import numpy as np

from pocketllava import Options, UnsupportedSchema
from pocketllava.engine.structured import Grammars
from pocketllava.llamacpp.text_model import TextModel
from pocketllava.names import open_bundle

if __name__ == "__main__":
    from counts import Counts
else:
    from attack.counts import Counts

HANG_S = 60.0  # for one case
MOST_TOKENS = 600
QUOTE, ENDS = 12.0, 6.0  # how much likelier random logits make what ends a string, a list or an object
BATCH = 500  # cases a child


def answer(text: TextModel, grammars: Grammars, schema: dict[str, Any], seed: int) -> str | None:
    """JSON by random logits that prefer to end things; None where it is longer than MOST_TOKENS."""
    rng = np.random.default_rng(seed)
    constraint = grammars.constraint(dict(Options(schema=schema).schema or {}))
    data = b""
    for _ in range(MOST_TOKENS):
        allowed = constraint.allowed()
        logits = rng.standard_normal(len(allowed))
        pieces = [text.vocabulary.piece(int(i)) for i in allowed]
        logits += [QUOTE if p[:1] == b'"' else ENDS if p[:1] in b"]}" else 0.0 for p in pieces]
        token = int(allowed[int(logits.argmax())])
        if text.vocabulary.is_end(token):
            return data.decode()
        run = [token]
        constraint.consume(run)
        if rng.random() < 0.5:
            run += (forced := constraint.forced())
            constraint.consume(forced)
        data += b"".join(map(text.vocabulary.piece, run))
        if constraint.complete:
            return data.decode()
    return None


def _attempts(text: TextModel, seeds: list[int], results: Any) -> None:
    grammars = Grammars(text)
    for seed in seeds:
        results.put((seed, "started", ""))
        schema = json_schemas.schema(random.Random(seed))
        try:
            found = answer(text, grammars, schema, seed)
            if found is not None:
                json_schemas.validate(found, schema)
            results.put((seed, "accepted" if found is not None else "long", ""))
        except UnsupportedSchema as error:
            results.put((seed, "refused", str(error)))
        except jsonschema.ValidationError as error:
            results.put((seed, "wrong", f"{found} of {json.dumps(schema)}: {error.message}"))
        except Exception as error:
            results.put((seed, "traceback", f"{error!r} of {json.dumps(schema)}"))
    results.put((-1, "done", ""))


def _child(seeds: list[int], results: Any) -> None:
    bundle = open_bundle("demo")
    text, _ = TextModel.load(bundle.model, n_ctx=64, n_threads=1, info=bundle.text_info)
    _attempts(text, seeds, results)


def run(seed: int, cases: int, folder: Path) -> Counts:
    """Every case of a seed."""
    counts = Counts()
    left = [seed * 1_000_000 + n for n in range(cases)]
    while left:
        batch, left = left[:BATCH], left[BATCH:]
        left = _batch(batch, counts) + left
    return counts


def _batch(seeds: list[int], counts: Counts) -> list[int]:
    """Run some cases in a child; those behind one that ended the child are given back."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=_child, args=(seeds, results))
    child.start()
    current, since = seeds[0], time.perf_counter()
    while True:
        try:
            seed, ending, note = results.get(timeout=1)
        except Exception:
            if child.is_alive() and time.perf_counter() - since < HANG_S:
                continue
            kind = "hang" if child.is_alive() else f"crash, exit code {child.exitcode}"
            counts.hangs, counts.crashes = (
                counts.hangs + child.is_alive(),
                counts.crashes + (not child.is_alive()),
            )
            counts.failures.append(
                f"seed {current}: {kind}: {json.dumps(json_schemas.schema(random.Random(current)))[:500]}"
            )
            child.kill()
            child.join()
            counts.cases += 1
            return seeds[seeds.index(current) + 1 :]
        if ending == "done":
            child.join()
            return []
        if ending == "started":
            current, since = seed, time.perf_counter()
            continue
        counts.cases += 1
        counts.refused += ending == "refused"
        counts.accepted += ending == "accepted"  # and validated; an answer may be too long to end
        counts.wrong += ending == "wrong"
        counts.tracebacks += ending == "traceback"
        if ending in ("wrong", "traceback"):
            counts.failures.append(f"seed {seed}: {note}")


if __name__ == "__main__":
    arguments = [int(a) for a in sys.argv[1:]] + [0, 20_000][len(sys.argv) - 1 :]
    found = run(arguments[0], arguments[1], Path())
    print(found.cases, "cases", {k: v for k, v in vars(found).items() if k not in ("cases", "failures")})
    print("\n".join(found.failures))

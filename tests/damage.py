"""Damaged checkpoints, drawn from a seed: bytes, headers, offsets, shapes, JSON, tokenizers, missing files.

    python tests/damage.py SEED NUMBER FOLDER

Converts NUMBER of them, one after the other, and prints what came of it as one JSON object: how many were
refused and how many converted all the same (what was damaged did not matter), the longest time, the peak
memory, and every case that did not end in a ConvertError of one line, or left a file behind.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_checkpoint
from attack.counts import Counts

from pocketllava import Bundle, ConvertError
from pocketllava.convert import convert

WEIGHTS, SLOW_S = "model.safetensors", 10.0
Draw = random.Random
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**40, 2**64, -(2**63), 10**30, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "<image>", "\n", "\ud800", "../../etc/passwd", "F16", "F32", "I64", "llama", "é" * 999,
    [], [1], [0, 0], [-2, -3], [2**40, 2**40], [None], {}, {"model_type": "llama"}, {"a": []}, [[[[]]]],
)  # fmt: skip


def bytes_changed(rng: Draw, data: bytes) -> bytes:
    """A few bytes flipped, cut out, put in twice, or everything after some place lost."""
    at = rng.randrange(max(1, len(data)))
    n = min(rng.choice((1, 2, 8, 64, 4096)), len(data) - at)
    return rng.choice(
        (
            lambda: data[:at] + rng.randbytes(n) + data[at + n :],
            lambda: data[:at] + data[at + n :],
            lambda: data[: at + n] + data[at:],
            lambda: data[:at],
            lambda: (
                data[:at] + rng.choice((b"\0", b"\xff", b"{", b'"', b"9" * 400, b"[" * 20000)) + data[at:]
            ),
        )
    )()


def json_changed(rng: Draw, value: Any, depth: int = 0) -> Any:
    """A value somewhere inside another one, left out, or under another name."""
    if not isinstance(value, (dict, list)) or not value or (depth and rng.random() < 0.15):
        return rng.choice(VALUES)
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    key: Any = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    action = rng.random()
    if action < 0.15:
        del copy[key]
    elif action < 0.2 and isinstance(copy, dict):
        copy[key + "x"] = copy.pop(key)
    else:
        copy[key] = json_changed(rng, copy[key], depth + 1)
    return copy


def spoil_json(rng: Draw, path: Path) -> None:
    """One to three values of a JSON file."""
    value = json.loads(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 3))):
        value = json_changed(rng, value)
    path.write_text(json.dumps(value), "utf-8")


def spoil_bytes(rng: Draw, path: Path) -> None:
    """Bytes of any file but the weights' data."""
    path.write_bytes(bytes_changed(rng, path.read_bytes()))


def spoil_header(rng: Draw, path: Path) -> None:
    """The safetensors header: its length, its JSON's values, its bytes, or the end of the file."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    text, kind = data[8 : 8 + n], rng.random()
    if kind < 0.5:
        text = json.dumps(json_changed(rng, json.loads(text))).encode()
    elif kind < 0.8:
        text = bytes_changed(rng, text)
    length = (
        len(text)
        if rng.random() < 0.85
        else rng.choice((0, 1, n - 1, n + 1, len(data), 2**32, 2**63, 2**64 - 1))
    )
    rest = data[8 + n :] if rng.random() < 0.9 else data[8 + n : rng.randrange(8 + n, len(data))]
    path.write_bytes(length.to_bytes(8, "little") + text + rest)


def spoil_data(rng: Draw, path: Path) -> None:
    """NaN, infinities or noise in the weights."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) // 2, len(data) - 8)
    data[at : at + 8] = rng.choice((b"\xff\x7f" * 4, b"\x00\x7c" * 4, b"\x00\xfc" * 4, rng.randbytes(8)))
    path.write_bytes(bytes(data))


def spoil_file(rng: Draw, path: Path) -> None:
    """Gone, empty, a folder, or another file's content."""
    other = rng.choice(sorted(p for p in path.parent.iterdir() if p.is_file()))
    content = other.read_bytes()[: 1 << 20]
    path.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind > 1:
        path.write_bytes(b"" if kind == 2 else content)


def spoil(rng: Draw, folder: Path) -> str:
    """Damage one file of a checkpoint; says which and how."""
    named = sorted(p for p in folder.iterdir() if p.suffix == ".json")
    likely = [p for p in named if p.name in ("config.json", "tokenizer.json")] * 3
    choices: list[tuple[Callable[[Draw, Path], None], Path]] = [
        (spoil_json, rng.choice(named + likely)),
        (spoil_json, rng.choice(named + likely)),
        (spoil_bytes, rng.choice([*named, folder / "tokenizer.model", folder / "tokenizer.model"])),
        (spoil_header, folder / WEIGHTS),
        (spoil_header, folder / WEIGHTS),
        (spoil_data, folder / WEIGHTS),
        (spoil_file, rng.choice([*named, folder / "tokenizer.model", folder / WEIGHTS])),
    ]
    how, path = rng.choice(choices)
    if rng.random() < 0.3 and path.name != "tokenizer.model":
        (folder / "tokenizer.model").unlink(missing_ok=True)  # so that tokenizer.json counts
    how(rng, path)
    return f"{how.__name__} {path.name}"


def outcome(source: Path, out: Path) -> str:
    """What came of a conversion: "converted", "refused", or what is wrong."""
    try:
        bundle = convert(source, out, quant="Q8_0", threads=2)
    except ConvertError as error:
        lines = str(error)
        fault = "more than a line" if "\n" in lines else "very long" if len(lines) > 2000 else ""
        return f"{fault}: {lines[:200]}" if fault else "refused" if not out.exists() else "left a file"
    except Exception:
        return traceback.format_exc(limit=-3)
    Bundle.open(bundle.folder).check_hashes()
    shutil.rmtree(out)
    return "converted"


def peak_bytes() -> int:
    """Peak resident memory of this process and of its children, whichever is more (0 on Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most * (1 if sys.platform == "darwin" else 1024)


def main(seed: int, number: int, folder: Path) -> dict[str, Any]:
    """Convert `number` damaged checkpoints in a folder of ours."""
    whole = small_checkpoint.write(folder / "whole", layers=1, ffn=256)
    counts, wrong, slowest = {"refused": 0, "converted": 0}, [], 0.0
    for n in range(number):
        rng = random.Random(f"{seed} {n}")
        source = folder / "damaged"
        shutil.copytree(whole, source)
        what = spoil(rng, source)
        start = time.perf_counter()
        came = outcome(source, folder / "out")
        took = time.perf_counter() - start
        slowest = max(slowest, took)
        if came in counts and took < SLOW_S:
            counts[came] += 1
        else:
            wrong.append({"case": f"{seed} {n}", "what": what, "took_s": round(took, 2), "came": came})
        if left := sorted(p.name for p in folder.iterdir() if p.name not in ("whole", "damaged")):
            wrong.append({"case": f"{seed} {n}", "what": what, "left": left})
            for name in left:
                shutil.rmtree(folder / name)
        shutil.rmtree(source)
    return {**counts, "slowest_s": round(slowest, 2), "peak_bytes": peak_bytes(), "wrong": wrong}


def campaign(seed: int, cases: int, folder: Path) -> Counts:
    """For `make attack`: in a process of its own, as a tensor's reader may end it."""
    command = [sys.executable, __file__, str(seed), str(cases), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return Counts(cases, crashes=1, failures=[done.stderr[-2000:]])
    ends = json.loads(done.stdout.splitlines()[-1])
    wrong = [json.dumps(case) for case in ends["wrong"]]
    return Counts(cases, ends["refused"], ends["converted"], wrong=len(wrong), failures=wrong)


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))

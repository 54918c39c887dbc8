"""Damaged GGUF files through every way in: a bundle, llama_cpp's handler, repair, quantize, imatrix.

Each mutant of a few small text models and mmprojs goes one of these ways in a child process, which survives neither a
signal nor a hang. What passes the checks is really used: loaded, evaluated, sampled, encoded with, written again.
Import this file as `attack.gguf_files`: started as a script it would hide the package gguf.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import small_checkpoint
from attack.counts import Counts
from attack.gguf_mutants import Draw, File, mutant
from PIL import Image
from small_checkpoint import Layout

from pocketllava import Bundle, PocketLlavaError
from pocketllava.convert import convert
from pocketllava.errors import BackendError, BundleError
from pocketllava.models.bundle import MANIFEST, MMPROJ, MODEL, describe_file
from pocketllava.models.gguf_header import STRING, Header
from pocketllava.models.manifest import FileRecord
from pocketllava.models.mmproj_contract import check_mmproj
from pocketllava.models.text_contract import check_text

CHECK_S, USE_S = 1.0, 30.0  # CPU seconds to refuse a file, seconds to use one
MAX_MESSAGE = 1000  # characters
FULL = 0.04  # of the mutants that go through quantize: so many are also written and load-tested
PROMPT = "USER: <image>\nWhat is é 日本 🙂 \t\0 \x7f</s> here?  ASSISTANT:"
N_LONG = 60_000  # twice what overflows std::regex on a stack of 8 MB
LONG = (*(c * N_LONG for c in "a 1日\n!é"), "a b'll " * (N_LONG // 7))
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Q4_K_M", {"layers": 1, "ffn": 256}),
    "grouped": ("F16", {"layers": 2, "ffn": 256, "kv_heads": 2, "kind": "mistral"}),
    "llama3": ("Q8_0", {"layers": 1, "ffn": 256, "llama3": True, "rope": "llama3"}),
}
HUB = "hub"  # the mmproj of "grouped", as llama.cpp's first scripts wrote it
WAYS = {
    MODEL: ("load", "bundle", "quantize", "imatrix"),
    MMPROJ: ("bundle", "handler", "repair", "quantize", "imatrix"),
}
START = "import sys; sys.path[:0] = {paths}; from attack.gguf_files import serve; serve()"


def whole_bundles(folder: Path) -> dict[str, Path]:
    """The bundles whose files are damaged, converted into a folder."""
    bundles = {}
    for name, (quant, layout) in LAYOUTS.items():
        source = small_checkpoint.write(folder / f"{name}-checkpoint", Layout(**layout))
        bundles[name] = convert(source, folder / name, quant=quant).folder
    return bundles


def hub_file(file: File) -> File:
    """An mmproj of 18 keys, with fc1 and fc2 swapped and CLIP's own projection_dim."""
    old = file.copy()
    left_out = ("clip.vision.feature_layer", "clip.projector_type", "general.type")
    old.keys = [key for key in old.keys if key[0] not in left_out]
    old.keys = [(n, k, 48 if n == "clip.vision.projection_dim" else v, i) for n, k, v, i in old.keys]
    old.keys += [("clip.has_text_encoder", 7, False, 0), ("clip.has_llava_projector", 7, True, 0)]
    old.keys += [("general.description", STRING, "image encoder for LLaVA", 0)]
    for t in old.tensors:
        swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
        t.name = ".".join(swap.get(part, part) for part in t.name.split("."))
    return old


def refused(path: Path) -> str:
    """The message of the check that refused a text model, "" for one that passed. Raises what no check should."""
    try:
        check_text(Header.read(path))
    except BundleError as error:
        return str(error)
    return ""


# Ways in, called in the child with a bundle's folder. Each raises a PocketLlavaError for what it refuses.


def use(path: Path) -> None:
    """Load a text model and do all that a conversation does with one. Raises BackendError."""
    from llama_cpp import llama_cpp

    from pocketllava.llamacpp.guard import translated
    from pocketllava.llamacpp.text_model import TextModel

    settings: dict[str, Any] = dict.fromkeys(("n_threads", "n_threads_batch"), 1)
    settings |= {"n_ctx": 256, "n_batch": 64, "n_ubatch": 64, "n_gpu_layers": 0}
    settings["flash_attn"] = bool(path.stat().st_size // 32 % 2)  # both kinds, by chance
    with translated("using it"):
        model, _ = TextModel.load(path, **settings)
        try:
            raw, out = PROMPT.encode(), (llama_cpp.llama_token * 512)()
            vocab = llama_cpp.llama_model_get_vocab(model.model)
            llama_cpp.llama_tokenize(vocab, raw, len(raw), out, 512, True, True)  # BOS, special tokens
            ids = model.tokenize(PROMPT)[:40] or [0]
            for run in LONG if path.parent.name == "long" else ():
                assert model.tokenize(run)
            model.decode_tokens(ids)
            model.decode_features(np.ones((4, model.n_embd), np.float32), 0)
            model.decode_tokens([0, model.n_vocab - 1])
            model.logits()
            words = model.vocabulary
            n = sum(len(words.piece(i)) + words.is_end(i) for i in range(model.n_vocab))
            for temperature in (0.0, 0.8):
                n += sum(1 for _ in islice(model.generate(ids, seed=1, temp=temperature), 2))
            assert n + len(words.special()) > 0
        finally:
            model.close()


def load(path: Path, _full: bool) -> None:
    """A text model alone, in a bundle's folder or not."""
    use(path / MODEL if path.is_dir() else path)


def bundle(folder: Path, _full: bool) -> None:
    """Open it, show it, plan its memory, ask about a picture."""
    from pocketllava import Llava
    from pocketllava.commands.show import tree
    from pocketllava.models.memory import memory

    opened = Bundle.open(folder)
    memory(opened)
    assert tree(opened)
    with Llava.load(folder, n_threads=1) as llava:
        llava.ask(picture(), "What is it?", max_tokens=2)


def imatrix(folder: Path, _full: bool) -> None:
    """Two prompts' importance."""
    from pocketllava import Llava
    from pocketllava.measure.importance import collect

    text = folder / "text.txt"
    text.write_text("What is here? " * 40, "utf-8")
    with Llava.load(folder, n_threads=1) as llava:
        collect(llava, text, folder / "imatrix.gguf", chunk=32, limit=2)


def handler(folder: Path, _full: bool) -> None:
    """llama_cpp's Llama of a good text model, with the mmproj standing alone."""
    from llama_cpp import Llama

    from pocketllava.integrations.llama_cpp import LlavaChatHandler

    alone = folder / "alone.gguf"
    shutil.copyfile(folder / MMPROJ, alone)
    chat = LlavaChatHandler(alone)
    llama = Llama(str(folder / MODEL), n_ctx=1024, n_threads=1, chat_handler=chat, verbose=False)
    parts = [{"type": "image_url", "image_url": {"url": data_uri()}}, {"type": "text", "text": "What is it?"}]
    try:
        llama.create_chat_completion([{"role": "user", "content": parts}], max_tokens=2)
    finally:
        chat.close()
        llama.close()


def repair(folder: Path, full: bool) -> None:
    """Examine and repair it, then use the result."""
    from pocketllava.convert.repair import examine
    from pocketllava.convert.repair import repair as repair_file

    repaired = folder / "out" / "repaired.gguf"
    repaired.parent.mkdir(exist_ok=True)
    examined = examine(folder / MMPROJ)
    repair_file(examined, repaired, force=True)
    if full:
        check_mmproj(Header.read(repaired))
        repaired.replace(folder / MMPROJ)
        handler(folder, full)


def quantize(folder: Path, full: bool) -> None:
    """Plan two other types; write and load-test some."""
    from pocketllava.convert.requantize import plan_requantize, requantize
    from pocketllava.convert.write.verify import check_contracts
    from pocketllava.models.gguf_writer import header_bytes

    opened, target = Bundle.open(folder), folder / "quantized"
    for job in plan_requantize(opened, {target: "Q8_0"}, "Q8_0"):
        check_contracts(job.text.header(target / MODEL), job.mmproj.header(target / MMPROJ))
        for plan in job.plans.values():
            header_bytes(plan.architecture, plan.keys, plan.tensors)
    if full:
        requantize(opened, {target: "Q4_K_M"}, mmproj="Q8_0", force=True, threads=1)


def abort(_folder: Path, _full: bool) -> None:
    """As llama.cpp does it: to see that the child is missed, and started again."""
    os.abort()


def picture() -> Image.Image:
    """One that every tower takes."""
    return Image.linear_gradient("L").convert("RGB")


def data_uri() -> str:
    """The same, as a chat completion has it."""
    import base64
    import io

    out = io.BytesIO()
    picture().save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def serve() -> None:
    """In the child: answer each request on stdin with one line of JSON."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what C prints is no answer
    for line in sys.stdin:
        way, folder, full = json.loads(line)
        start = time.process_time()  # other programs' work does not count; a hang is found by the clock
        answer: dict[str, Any] = {"outcome": "accepted", "message": ""}
        try:
            globals()[way](Path(folder), full)
        except BackendError as error:
            answer = {"outcome": "failed", "message": str(error)}
        except PocketLlavaError as error:
            answer = {"outcome": "refused", "message": str(error)}
        except Exception:
            answer = {"outcome": "traceback", "message": traceback.format_exc(limit=-4)}
        out.write(json.dumps(answer | {"took_s": time.process_time() - start}) + "\n")
        out.flush()


@dataclass(frozen=True)
class Result:
    """How one way ended: "accepted", "failed" (an orderly BackendError), "refused", "traceback", "crash" or "hang"."""

    outcome: str
    message: str = ""
    took_s: float = 0.0

    @property
    def fault(self) -> str:
        """What is wrong with it, as a field of Counts; "" where nothing is."""
        if self.outcome in ("traceback", "crash", "hang"):
            return {"traceback": "tracebacks", "crash": "crashes", "hang": "hangs"}[self.outcome]
        if "signal SIG" in self.message:
            return "crashes"  # of the load test
        unfit = len(self.message) > MAX_MESSAGE or not self.message.isprintable()
        slow = self.outcome == "refused" and self.took_s > CHECK_S
        return "wrong" if unfit or slow else ""


class Child:
    """A process that takes files one way after the other, and is started again when one killed it."""

    def __init__(self, most_s: float = USE_S) -> None:
        """most_s: seconds that a file may take."""
        self.process: subprocess.Popen[str] | None = None
        self.most_s = most_s

    def ask(self, way: str, folder: Path, full: bool = False) -> Result:
        """Take a bundle's folder one way."""
        if self.process is None:
            paths = [str(Path(__file__).parents[1])]
            self.process = subprocess.Popen(
                [sys.executable, "-c", START.format(paths=paths)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([way, str(folder), full]) + "\n")
        self.process.stdin.flush()
        watch = threading.Timer(self.most_s, self.process.kill)
        watch.start()
        answer = self.process.stdout.readline()
        hung = not watch.is_alive()
        watch.cancel()
        if answer:
            return Result(**json.loads(answer))
        code = self.process.wait()
        self.close()
        return Result("hang") if hung else Result("crash", f"signal {-code}")

    def use(self, path: Path) -> str:
        """Load a text model: "accepted", or what went wrong."""
        result = self.ask("load", path)
        return result.outcome if result.outcome == "accepted" else f"{result.outcome}: {result.message}"

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                pipe.close()
        self.process = None


@dataclass
class Campaign:
    """Bundles to damage, their files read once, and a folder for the one that is damaged."""

    bundles: dict[str, Path]
    folder: Path
    child: Child = field(default_factory=Child)
    outcomes: dict[str, int] = field(default_factory=dict)  # by way and outcome
    slowest_s: float = 0.0  # refusal

    def __post_init__(self) -> None:
        self.files = {
            name: {n: File.read(path / name) for n, path in self.bundles.items()} for name in (MODEL, MMPROJ)
        }
        self.files[MMPROJ][HUB] = hub_file(self.files[MMPROJ]["grouped"])
        for path in self.bundles.values():
            shutil.copytree(path, self.folder / path.name)

    def cases(self, seed: int, n_cases: int) -> Iterator[tuple[str, Result]]:
        """(how to repeat it, how it ended) of mutants drawn from a seed."""
        for n in range(n_cases):
            rng = random.Random(f"{seed} {n}")
            name = rng.choice((MODEL, MMPROJ))
            way = rng.choice(WAYS[name])
            change, result = self.case(f"{seed} {n}", rng, name, way)
            key = f"{name} {way} {result.outcome}"
            self.outcomes[key] = self.outcomes.get(key, 0) + 1
            if result.outcome == "refused":
                self.slowest_s = max(self.slowest_s, result.took_s)
            yield f"seed {seed}, case {n}: {name} by {way}: {change}", result

    def case(self, label: str, rng: Draw, name: str, way: str) -> tuple[str, Result]:
        """One mutant in its bundle's place, taken one way; then the whole file again."""
        base = "grouped" if way == "quantize" else rng.choice(sorted(self.files[name]))
        change, raw = mutant(label, {base: self.files[name][base]})
        whole = self.bundles["grouped" if base == HUB else base]
        folder = self.folder / whole.name
        put(folder, name, raw)
        try:
            return change, self.child.ask(way, folder, rng.random() < FULL)
        finally:
            for path in folder.iterdir():
                if path.name not in (MODEL, MMPROJ, MANIFEST):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            for path in whole.iterdir():
                (folder / path.name).unlink(missing_ok=True)
                shutil.copyfile(path, folder / path.name)


def put(folder: Path, name: str, raw: bytes) -> None:
    """Another file in a bundle, recorded in its manifest as if it had been verified."""
    path = folder / name
    path.unlink(missing_ok=True)  # not in place: a child may have mapped it
    path.write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    try:
        record = describe_file(Header.read(path), digest)
    except BundleError:
        n = min(len(raw), 64)
        record = FileRecord(len(raw), n, hashlib.sha256(raw[:n]).hexdigest(), digest)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"][name] = asdict(record)
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


def attack(campaign: Campaign, seed: int, cases: int) -> Counts:
    """Take a number of mutants through the campaign's bundles."""
    counts = Counts()
    try:
        for case, result in campaign.cases(seed, cases):
            counts.cases += 1
            if fault := result.fault:
                setattr(counts, fault, getattr(counts, fault) + 1)
                counts.failures.append(
                    f"{case}: {result.outcome} in {result.took_s:.2f} CPU seconds: {result.message}"
                )
            elif result.outcome == "accepted":
                counts.accepted += 1
            else:
                counts.refused += 1
    finally:
        campaign.child.close()
    return counts


def run(seed: int, cases: int, folder: Path) -> Counts:
    """A campaign in a folder of its own."""
    (folder / "damaged").mkdir(parents=True)
    return attack(Campaign(whole_bundles(folder / "whole"), folder / "damaged"), seed, cases)

"""The work of soak.py: pictures and questions by their number, and one function a part. Knows Llava; measures nothing.

Everything follows from a number, so that a fresh model can be asked again without anything having been kept.
"""

from __future__ import annotations

import base64
import io
import math
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pocketllava import Answer, Llava, Message, Options
from pocketllava.errors import EngineDied, ImageError, ModelNotFound
from pocketllava.models.demo.scenes import HELD_OUT_SEEDS, questions, scene

GREEDY = Options(max_tokens=24, truncate="oldest")
SCHEMA = {
    "type": "object",
    "properties": {"color": {"type": "string", "maxLength": 12}},
    "required": ["color"],
}
OTHERS = (
    Options(max_tokens=24, truncate="oldest", temperature=0.8, seed=1, top_p=0.9),
    Options(max_tokens=48, truncate="oldest", schema=SCHEMA),
    Options(max_tokens=8, truncate="oldest", choices=("red", "blue", "a green star")),
    Options(max_tokens=8, truncate="oldest", prefill="The answer is", top_logprobs=2),
    Options(max_tokens=8, truncate="oldest", image_tokens=12),
)
LONG = Options(max_tokens=400, temperature=1.5, schema={"type": "string", "minLength": 1500}, seed=3)
DAMAGED = b"\x89PNG\r\n\x1a\nno picture"
FILES = 40  # names that pictures are written under in turn: a name's content changes
TIE = 0.05  # of log probability; a quantized model's moves by 0.01 with the batches
Turn = tuple[str, str, int | None]  # role, text, number of a picture


@dataclass(frozen=True)
class Check:
    """A conversation and the greedy answer that it got. n_ctx and cached: how the model was loaded.

    equal: whether the answer is right, where that is known without a fresh model.
    """

    turns: tuple[Turn, ...]
    token_ids: tuple[int, ...]
    n_ctx: int = 512
    cached: bool = False
    equal: bool | None = None


class Pictures:
    """Different pictures by number, in the forms and sizes that a user has."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, n: int) -> Any:
        """A path, bytes, an open file, a data URI, a PIL image or an array."""
        rng = random.Random(n)
        picture = scene(HELD_OUT_SEEDS[n]).draw()
        if rng.random() < 0.7:
            picture = picture.resize((rng.randrange(40, 900), rng.randrange(40, 900)))
        form = n % 6
        if form < 2:
            return picture if form else np.asarray(picture)
        file = io.BytesIO()
        picture.save(file, ("PNG", "JPEG", "WEBP")[n % 3])
        if form == 2:
            return file.getvalue()
        if form == 3:
            return f"data:image/any;base64,{base64.b64encode(file.getvalue()).decode()}"
        if form == 4:
            return io.BytesIO(file.getvalue())
        path = self._folder / f"{n % FILES}.png"
        path.write_bytes(file.getvalue())
        return path

    def messages(self, turns: tuple[Turn, ...]) -> list[Message]:
        """Turns as a model takes them."""
        return [
            Message(role, text, () if picture is None else self(picture))  # type: ignore[arg-type]
            for role, text, picture in turns
        ]


def question(n: int, rng: random.Random) -> str:
    """One that can be asked about picture n."""
    return rng.choice(questions(scene(HELD_OUT_SEEDS[n]))).turns[0].question


@contextmanager
def pictures() -> Iterator[Pictures]:
    """With a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        yield Pictures(Path(folder))


def fresh(check: Check) -> str:
    """How the answer of a model that is loaded for it compares: "equal", "tie" or "other".

    "tie": at the first token that differs, both are as likely but for rounding, which depends on how much of a prompt
    was evaluated before (engine/kv_cache.py).
    """
    if check.equal is not None:
        return "equal" if check.equal else "other"
    with pictures() as show, tempfile.TemporaryDirectory() as cache, _loaded(check, Path(cache)) as model:
        answer = model.chat(show.messages(check.turns), options=replace(GREEDY, top_logprobs=20))
        if answer.token_ids == check.token_ids:
            return "equal"
        with model.session() as session:
            return "tie" if _is_tie(answer, check.token_ids, session.text.vocabulary.piece) else "other"


def _is_tie(answer: Answer, others: tuple[int, ...], piece: Callable[[int], bytes]) -> bool:
    """Whether another answer differs first where the tokens are about as likely."""
    pairs = zip(answer.token_ids, others, answer.logprobs, strict=False)
    for token, other, logprob in pairs:
        if token != other:
            likely = {data: value for _, value, data in logprob.top}
            return logprob.logprob - likely.get(piece(other), -math.inf) < TIE
    return False  # one ends where the other goes on


def _loaded(check: Check, cache: Path) -> Llava:
    load: dict[str, Any] = {"cache_dir": cache, "keep_prefixes": True} if check.cached else {}
    return Llava.load("demo", n_ctx=check.n_ctx, n_threads=1, **load)


def images(n: int) -> Iterator[Check]:
    """n different pictures, each with a question; now and then one that is damaged."""
    with pictures() as show, Llava.load("demo", n_ctx=512, n_threads=1) as model:
        for k in range(n):
            if k % 50 == 0:
                with suppress(ImageError):
                    model.ask(DAMAGED, "What is this?")
            turns: tuple[Turn, ...] = (("user", question(k, random.Random(k)), k),)
            yield Check(turns, model.chat(show.messages(turns), options=GREEDY).token_ids)


def conversations(n: int) -> Iterator[Check]:
    """n conversations, edited and cancelled on their way, with a bounded cache folder."""
    with (
        pictures() as show,
        tempfile.TemporaryDirectory() as cache,
        Llava.load(
            "demo", n_ctx=512, n_threads=1, cache_dir=cache, cache_bytes=20_000_000, keep_prefixes=True
        ) as model,
    ):
        for k in range(n):
            yield _conversation(model, show, random.Random(k), k)


def _conversation(model: Llava, show: Pictures, rng: random.Random, n: int) -> Check:
    """One conversation; its last turn is greedy, and answered to the end."""
    turns: list[Turn] = [("user", question(n, rng), n)]
    for _ in range(rng.randrange(1, 7)):
        text = str(_disturbed(model, show, tuple(turns), rng))
        turns.append(("assistant", text, None))
        if rng.random() < 0.25:  # edited: an earlier question is replaced, and what followed is gone
            at = 2 * rng.randrange((len(turns) + 1) // 2)
            turns[at:] = [("user", question(n, rng), turns[at][2])]
        else:
            other = n + rng.randrange(50) if rng.random() < 0.2 else None
            turns.append(("user", question(n, rng), other))
    if rng.random() < 0.05:
        model.clear_cache()
    answer = model.chat(show.messages(tuple(turns)), options=GREEDY)
    return Check(tuple(turns), answer.token_ids, cached=True)


def _disturbed(model: Llava, show: Pictures, turns: tuple[Turn, ...], rng: random.Random) -> str:
    """An answer of some kind: whole, cancelled at any step, left after a chunk, or asked after a preparation."""
    messages, way = show.messages(turns), rng.random()
    options = GREEDY if rng.random() < 0.6 else rng.choice(OTHERS)
    if way < 0.25:
        left = rng.randrange(200)
        asked = iter(range(left))
        chunks = model.stream(messages, options=options, should_stop=lambda: next(asked, None) is None)
        return "".join(map(str, chunks))
    if way < 0.4:
        with closing(model.stream(messages, options=options)) as stream:  # type: ignore[type-var]
            return str(next(stream))
    if way < 0.55:
        model.prefill(show(rng.randrange(3000)))  # of a picture that the question is not about
    return model.chat(messages, options=options).text


def loads(n: int) -> Iterator[Check]:
    """n models, loaded, asked and closed; now and then one in a child, and one that cannot be loaded."""
    with pictures() as show:
        for k in range(n):
            if k % 10 == 0:
                with suppress(ModelNotFound):
                    Llava.load("no such model")
            turns: tuple[Turn, ...] = (("user", question(k, random.Random(k)), k),)
            n_ctx = (512, 256, 1024)[k % 3]
            load: dict[str, Any] = {"kv_type": ("f16", "auto")[k % 2], "weights": ("mapped", "memory")[k % 2]}
            with Llava.load("demo", n_ctx=n_ctx, n_threads=1, isolated=k % 5 == 4, **load) as model:
                yield Check(turns, model.chat(show.messages(turns), options=GREEDY).token_ids, n_ctx)


def restarts(n: int) -> Iterator[Check]:
    """n engines that are killed in their child, at rest or amid an answer; the next call finds another."""
    with pictures() as show, Llava.load("demo", n_ctx=512, n_threads=1, isolated=True) as model:
        for k in range(n):
            _killed(model, show, random.Random(k), k)
            turns: tuple[Turn, ...] = (("user", question(k, random.Random(k)), k),)
            answer = _asked_until_alive(lambda t=turns: model.chat(show.messages(t), options=GREEDY))  # type: ignore[misc]
            yield Check(turns, answer.token_ids)


def _killed(model: Llava, show: Pictures, rng: random.Random, n: int) -> None:
    engine = psutil.Process().children()[0]
    if n % 4 == 0:  # at rest
        engine.kill()
        return
    timer = threading.Timer(rng.uniform(0, 0.15), engine.kill)
    timer.start()
    with suppress(EngineDied):
        model.chat(show.messages((("user", "Describe the image.", n),)), options=LONG)
    timer.join()


def _asked_until_alive(ask: Callable[[], Answer]) -> Answer:
    """The kill of an engine at rest may be noticed by the call after it."""
    try:
        return ask()
    except EngineDied:
        return ask()


def served(n: int) -> Iterator[Check]:
    """As restarts, of a `pocketllava serve`; soak.py watches the server's process, its only child here."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from attack.server import long_request
    from attack.server import served as serving

    with serving("--ctx", "512", "--threads", "1") as server:
        for k in range(n):
            rng, engine = random.Random(k), server.engine
            with server.ask(long_request(rng, 96, stream=bool(k % 2))):
                time.sleep(rng.uniform(0, 0.2))
                engine.kill()
                psutil.wait_procs([engine], 10)
            yield Check((), (), equal=server.right())  # what the server answered when it was new


PARTS: dict[str, Callable[[int], Iterator[Check]]] = {
    "images": images, "conversations": conversations, "loads": loads, "restarts": restarts, "served": served,
}  # fmt: skip

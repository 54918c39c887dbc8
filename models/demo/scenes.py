"""Drawn scenes, questions about them and their one right answer, from a seed; knows nothing of torch or models.

`held_out(n)` is the project's test set; `scene(seed).draw()` its sample pictures.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pocketllava.models.demo.world import COLORS, DIGITS, PLACES, SHAPES, Scene, Thing, pick, scene

__all__ = [
    "HELD_OUT_SEEDS", "KINDS", "QA", "REFUSAL", "TRAIN_SEEDS", "Scene", "Turn", "held_out", "questions", "scene",
]  # fmt: skip

TRAIN_SEEDS = range(0, 10_000_000)
HELD_OUT_SEEDS = range(10_000_000, 11_000_000)  # never trained on
REFUSAL = "I can't see that."
STRANGERS = (
    "dog",
    "cat",
    "car",
    "tree",
    "house",
    "person",
    "bird",
    "boat",
    "flower",
    "chair",
    "horse",
    "cup",
)


@dataclass(frozen=True)
class Turn:
    """A question and its one right answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class QA:
    """A conversation about one scene; kind names its last turn."""

    kind: str
    turns: tuple[Turn, ...]


def article(words: str) -> str:
    """`a red circle`, `an orange star`."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _single(things: Sequence[Thing]) -> list[Thing]:
    """Those whose noun no other thing shares."""
    return [t for t in things if sum(o.noun == t.noun for o in things) == 1]


def _refer(s: Scene, t: Thing, rng: random.Random) -> str:
    """`circle` where that is enough, or `red circle`."""
    return t.noun if t in _single(s.things) and rng.random() < 0.5 else t.name


def _what(s: Scene, rng: random.Random) -> Turn:
    t = pick(rng, s.things)
    if len(s.things) == 1 and rng.random() < 0.5:
        return Turn("What is this?", article(t.name))
    return Turn(f"What is at the {t.place}?", article(t.name))


def _color(s: Scene, rng: random.Random) -> Turn | None:
    if rng.random() < 0.3:
        t = pick(rng, s.things)
        return Turn(f"What color is the thing at the {t.place}?", t.color)
    known = _single(s.things)
    ask = pick(rng, ("What color is the {}?", "Which color does the {} have?"))
    return (lambda t: Turn(ask.format(t.noun), t.color))(pick(rng, known)) if known else None


def _shape(s: Scene, rng: random.Random) -> Turn | None:
    shapes = [t for t in s.things if t.shape in SHAPES]
    if shapes and rng.random() < 0.4:
        t = pick(rng, shapes)
        return Turn(f"What shape is at the {t.place}?", t.shape)
    known = [t for t in shapes if sum(o.color == t.color for o in s.things) == 1]
    ask = pick(rng, ("What shape is the {} thing?", "Which shape is {}?"))
    return (lambda t: Turn(ask.format(t.color), t.shape))(pick(rng, known)) if known else None


def _size(s: Scene, rng: random.Random) -> Turn:
    t = pick(rng, s.things)
    return Turn(
        pick(rng, ("How big is the {}?", "Is the {} small or large?")).format(_refer(s, t, rng)), t.size
    )


def _place(s: Scene, rng: random.Random) -> Turn:
    t = pick(rng, s.things)
    return Turn(f"Where is the {_refer(s, t, rng)}?", t.place)


def _count(s: Scene, rng: random.Random) -> Turn:
    way, t, present = pick(rng, (0, 1, 2)), pick(rng, s.things), rng.random() < 0.85
    if way == 0:
        return Turn(f"How many {pick(rng, ('things', 'objects'))} are there?", str(len(s.things)))
    if way == 1:
        color = t.color if present else pick(rng, COLORS)
        return Turn(f"How many {color} things are there?", str(sum(o.color == color for o in s.things)))
    shape = t.shape if present and t.shape in SHAPES else pick(rng, SHAPES)
    plural = shape + ("es" if shape == "cross" else "s")
    return Turn(f"How many {plural} are there?", str(sum(o.shape == shape for o in s.things)))


def _left_right(s: Scene, rng: random.Random) -> Turn | None:
    """Of two things in different columns; the first is not in the middle one."""
    pairs = [(a, b) for a in s.things for b in s.things if a.cell % 3 != b.cell % 3 and a.cell % 3 != 1]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    side = "left" if a.cell % 3 < b.cell % 3 else "right"
    words = f"{_refer(s, a, rng)} {{}} of the {_refer(s, b, rng)}?"
    if rng.random() < 0.6:
        return Turn("Is the " + words.format("left or right"), side)
    asked = pick(rng, ("left", "right"))
    return Turn("Is the " + words.format(asked), "yes" if asked == side else "no")


def _yes_no(s: Scene, rng: random.Random) -> Turn:
    """Half yes; half of the noes ask for a present shape in another color."""
    t, way, truth = pick(rng, s.things), rng.random(), rng.random() < 0.5
    if way < 0.4:
        noun = t.noun if truth else _absent_noun(s, rng)
        return Turn(f"Is there {article(noun)}?", "yes" if truth else "no")
    name = t.name if truth else _absent_name(s, rng)
    if way < 0.75 or t not in _single(s.things):
        return Turn(f"Is there {article(name)}?", "yes" if truth else "no")
    color = t.color if truth else pick(rng, [c for c in COLORS if c != t.color])
    return Turn(f"Is the {t.noun} {color}?", "yes" if truth else "no")


def _absent_noun(s: Scene, rng: random.Random) -> str:
    nouns = [*SHAPES, f"number {pick(rng, DIGITS)}"]
    return pick(rng, [n for n in nouns if all(t.noun != n for t in s.things)])


def _absent_name(s: Scene, rng: random.Random) -> str:
    noun = pick(rng, s.things).noun if rng.random() < 0.6 else _absent_noun(s, rng)
    names = [f"{c} {noun}" for c in COLORS]
    return pick(rng, [n for n in names if all(t.name != n for t in s.things)])


def _digit(s: Scene, rng: random.Random) -> Turn | None:
    digits = [t.shape for t in s.things if t.shape in DIGITS]
    if not digits:
        return None
    one = ("What number is written?", "Which number do you see?")
    return Turn(pick(rng, one if len(digits) == 1 else ("Which numbers are written?",)), listed(digits))


def _background(s: Scene, _: random.Random) -> Turn:
    return Turn("What color is the background?", s.background)


def _content(s: Scene, rng: random.Random) -> Turn:
    ask = pick(rng, ("What's the content of the image?", "What is in the image?"))
    return Turn(ask, f"The image shows {listed([article(t.name) for t in s.things])}.")


def _describe(s: Scene, _: random.Random) -> Turn:
    items = [f"{article(t.size + ' ' + t.name)} at the {t.place}" for t in s.things]
    return Turn("Describe the image.", f"There is {listed(items)} on a {s.background} background.")


def _refusal(s: Scene, rng: random.Random) -> Turn:
    way = rng.random()
    if way < 0.25:
        empty = [p for k, p in enumerate(PLACES) if all(t.cell != k for t in s.things)]
        return Turn(f"What is at the {pick(rng, empty)}?", REFUSAL)
    missing = (
        pick(rng, STRANGERS) if way < 0.5 else _absent_noun(s, rng) if way < 0.8 else _absent_name(s, rng)
    )
    asks = ("Where is the {}?", "How big is the {}?") + (("What color is the {}?",) if way < 0.8 else ())
    return Turn(pick(rng, asks).format(missing), REFUSAL)


SINGLE: dict[str, Callable[[Scene, random.Random], Turn | None]] = {
    "what": _what, "color": _color, "shape": _shape, "size": _size, "place": _place, "count": _count,
    "left_right": _left_right, "yes_no": _yes_no, "digit": _digit, "background": _background,
    "content": _content, "describe": _describe, "refusal": _refusal,
}  # fmt: skip
KINDS = (*SINGLE, "follow_up")


def _follow_up(s: Scene, rng: random.Random) -> tuple[Turn, ...]:
    """Two or three turns: `it` is the thing just spoken of, or the turns have nothing to do with each other."""
    if rng.random() < 0.35:
        turns = [SINGLE[pick(rng, tuple(SINGLE))](s, rng) for _ in range(3)]
        return tuple(t for t in turns if t)[-2:]
    t = pick(rng, s.things)
    later = [Turn("How big is it?", t.size)]
    first = Turn(f"What is at the {t.place}?", article(t.name))
    if t in _single(s.things) and rng.random() < 0.5:
        first = Turn(f"What color is the {t.noun}?", t.color)
        later.append(Turn("Where is it?", t.place))
    elif rng.random() < 0.5:
        first = Turn(f"Where is the {t.name}?", t.place)
    else:
        later.append(Turn("What color is it?", t.color))
    later.sort(key=lambda _: rng.random())
    return first, *later[: 1 + int(rng.random() * len(later))]


def questions(s: Scene, seed: int = 0) -> list[QA]:
    """One question of every kind that the scene allows; another seed asks others."""
    rng = random.Random(s.seed * 1_000 + seed)
    turns = {kind: ask(s, rng) for kind, ask in SINGLE.items()}
    found = [QA(kind, (turn,)) for kind, turn in turns.items() if turn]
    return [*found, QA("follow_up", _follow_up(s, rng))]


def held_out(n: int) -> Iterator[tuple[Scene, QA]]:
    """n held-out questions, each about a scene of its own, the kinds in turn; the first ones don't depend on n."""
    seeds = iter(HELD_OUT_SEEDS)
    for k in range(n):
        kind = KINDS[k % len(KINDS)]
        yield next((s, qa) for s in map(scene, seeds) for qa in questions(s) if qa.kind == kind)

"""Attacks chat templates and tokenizer files: random programs in Jinja, random damage to what a checkpoint brings.

.venv/bin/python tests/attack/templates.py [SEED [CASES]]
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import small_checkpoint
import small_llama3
from small_checkpoint import CHAT_TEMPLATE

from pocketllava import Message, PocketLlavaError
from pocketllava.convert import convert
from pocketllava.convert.pipeline import plan
from pocketllava.models.chat_template import check
from pocketllava.prompt.items import ImageSpan
from pocketllava.prompt.template import Template

if __name__ == "__main__":
    from counts import Counts
else:
    from attack.counts import Counts

HANG_S = 5.0  # of computing, for one case
CONVERTED = 20  # of the tokenizers that a plan accepts every twentieth is converted and load-tested
SPECIAL = {"<s>": 1, "</s>": 2, "<image>": 700, "<pad>": 701}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
ATOMS = (
    "messages", "messages[0]", "messages[-1].content", "bos_token", "'ab'", "'%9999d'", "'{:9}'", "1", "99999", "-1", "0.5",
    "1e308", "[1, 'a']", "{'a': 1}", "(1, 2)", "range(99999)", "none", "x", "ns.x", "undefined_name", "'\\ud800'", "'\u0130'",
)  # fmt: skip
FILTERS = (
    "join", "list", "string", "length", "upper", "trim", "tojson", "first", "last", "sort", "reverse", "unique", "sum",
    "map('string')", "map(attribute='role')", "select", "selectattr('type', 'equalto', 'image')", "center(9999)",
    "indent(9999)", "replace('a', 'aaaaaaaa')", "batch(3, 'x')", "slice(9)", "groupby('role')", "dictsort", "items", "int",
    "float", "round(9)", "abs", "wordwrap(1)", "truncate(9)", "title", "e", "format(1, 2)", "default('a')", "random",
    "wordcount", "urlencode", "tojson(indent=9)", "min", "max", "nothing",
)  # fmt: skip
METHODS = (
    "split()", "strip()", "replace('a', 'bbbb')", "upper()", "join(['a', 'b'])", "format(1)", "items()", "get('a')", "ljust(9)",
    "append(1)", "encode()", "count('a')", "__class__", "splitlines()", "index('a')", "startswith('a')", "x", "role",
)  # fmt: skip
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is", "not in")


def expression(rng: random.Random, depth: int) -> str:
    """A random expression, mostly a valid one."""
    if depth <= 0 or rng.random() < 0.2:
        return rng.choice(ATOMS)
    inner = expression(rng, depth - 1)
    kind = rng.randrange(7)
    if kind == 0:
        return f"({inner} {rng.choice(OPERATORS)} {expression(rng, depth - 1)})"
    if kind == 1:
        return f"({inner})|{rng.choice(FILTERS)}"
    if kind == 2:
        return f"({inner}).{rng.choice(METHODS)}"
    if kind == 3:
        return f"[{inner}, {expression(rng, depth - 1)}]"
    if kind == 4:
        return f"({inner} if {expression(rng, depth - 1)} else {rng.choice(ATOMS)})"
    if kind == 5:
        return f"({inner})[{rng.choice(('0', '-1', '1:', '::-1', 'x', inner))}]"
    return f"f({inner})"


def statement(rng: random.Random, depth: int) -> str:
    """A random piece of a template."""
    if depth <= 0:
        return rng.choice(("<image>", "USER: ", "\n", "{{ " + expression(rng, 2) + " }}"))
    body = "".join(statement(rng, depth - 1) for _ in range(rng.randint(1, 3)))
    e = expression(rng, 3)
    return rng.choice((
        "{{ " + e + " }}" + body,
        "{% set x = " + e + " %}" + body,
        "{% set ns.x = [ns.x, " + e + "] %}" + body,
        "{% set ns.x = ns.x ~ ns.x %}" + body,
        "{% set x %}" + body + "{% endset %}{{ x }}",
        "{% for x in " + e + " %}" + body + "{% endfor %}",
        "{% for x in range(99999) %}" + body + "{% endfor %}",
        "{% for x in messages recursive %}" + body + "{{ loop(" + e + ") }}{% endfor %}",
        "{% if " + e + " %}" + body + "{% else %}" + e + "{% endif %}",
        "{% macro f(x) %}" + body + "{{ f(x) }}{% endmacro %}{{ f(" + e + ") }}",
        "{% filter " + rng.choice(FILTERS) + " %}" + body + "{% endfilter %}",
        "{% generation %}" + body + "{% endgeneration %}",
    ))  # fmt: skip


def mutated(rng: random.Random, text: str, parts: tuple[str, ...]) -> str:
    """A text with pieces cut out, repeated or put in."""
    for _ in range(rng.randint(1, 5)):
        a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + 40)
        new = rng.choice(
            ("", text[a:b] * 2, rng.choice(parts), chr(rng.choice((0, 10, 34, 123, 125, 0x10FFFF))))
        )
        text = text[:a] + new + text[b:]
    return text


def template_case(rng: random.Random) -> str:
    """A whole template."""
    if rng.random() < 0.5:
        return mutated(rng, CHAT_TEMPLATE, (*FILTERS, *ATOMS, "{{", "}}", "{%", "%}", "for", "endfor", "|"))
    return (
        "{% set ns = namespace(x='ab') %}" + statement(rng, 3) + (CHAT_TEMPLATE if rng.random() < 0.5 else "")
    )


def try_template(source: str) -> bool:
    """Check and use it; True if its prompts are wrong although it was accepted."""
    check(source, "<image>", TOKENS)
    template = Template(source, SPECIAL, "<image>", "<s>", "</s>", True, "every", TOKENS)
    span = ImageSpan("picture", 576)
    pieces = template.pieces([Message("user", "Is <image> or </s> in it?", (b"",))], [span])
    return pieces.count(span) != 1


def damaged_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with one thing changed, somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value)[:60])
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: damaged_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        n = rng.randrange(len(value))
        return [*value[:n], damaged_value(rng, value[n]), *value[n + 1 :]]
    return rng.choice((
        None, True, -1, 0, 1, 2**31, 2**70, 0.5, float("inf"), "", "a", "<image>", "</s>", "\ud800", "x" * 70000, [], {}, [[]],
        {"a": 1}, [value, value], str(value)[:100],
    ))  # fmt: skip


def damage_tokenizer(rng: random.Random, folder: Path) -> str:
    """Damage one of the tokenizer's files in place; which one, and how."""
    name = rng.choice([p.name for p in sorted(folder.glob("*token*")) if p.name != "generation_config.json"])
    path = folder / name
    if name.endswith(".json") and rng.random() < 0.8:
        value = json.loads(path.read_text("utf-8"))
        for _ in range(rng.randint(1, 3)):
            value = damaged_value(rng, value)
        path.write_text(json.dumps(value), "utf-8")
        return f"{name}: changed"
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 4, 40))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data))
    return f"{name}: bytes"


def try_tokenizer(rng: random.Random, bases: list[Path], work: Path) -> bool:
    """Plan, and now and then convert, a checkpoint whose tokenizer is damaged; True if a remark is no line."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(rng.choice(bases), work / "checkpoint")
    damage_tokenizer(rng, work / "checkpoint")
    planned = plan(work / "checkpoint", quant="F16")
    if rng.randrange(CONVERTED) == 0:
        convert(work / "checkpoint", work / "bundle", quant="F16")
    return not all(remark.isprintable() and len(remark) <= 1000 for remark in planned.remarks)


def run(seed: int, cases: int, folder: Path) -> Counts:
    """Half templates, half tokenizers; `folder` is for the files that are made."""
    rng = random.Random(seed)
    small = {"layers": 1, "vision_layers": 2}
    bases = [
        small_checkpoint.write(folder / "llama", **small),
        small_checkpoint.write(folder / "model-alone", tokenizer_json=False, **small),
        small_checkpoint.write(folder / "llama3", llama3=True, **small),
    ]
    assert small_llama3.image_token()
    counts = Counts()
    for n in range(cases):
        case = random.Random(rng.random())
        if n % 2:
            judge(counts, f"seed {seed}, case {n}", lambda c=case: try_tokenizer(c, bases, folder / "work"))  # type: ignore[misc]
        else:
            source = template_case(case)
            judge(counts, f"seed {seed}, case {n}: {source!r:.300}", lambda s=source: try_template(s))  # type: ignore[misc]
    return counts


def judge(counts: Counts, name: str, attempt: Callable[[], bool]) -> None:
    """Count one case."""
    counts.cases += 1
    start = time.process_time()
    try:
        wrong = attempt()
        counts.accepted += 1
    except PocketLlavaError as error:
        counts.refused += 1
        wrong = not str(error).isprintable() or len(str(error)) > 1000
        if "signal" in str(error):
            counts.crashes += 1
            counts.failures.append(f"crash: {name}: {error}")
    except Exception as error:
        counts.tracebacks += 1
        counts.failures.append(f"traceback: {name}: {type(error).__name__}: {error}"[:600])
        return
    if wrong:
        counts.wrong += 1
        counts.failures.append(f"wrong: {name}")
    if time.process_time() - start > HANG_S:
        counts.hangs += 1
        counts.failures.append(f"hang: {name}")


if __name__ == "__main__":
    arguments = [int(a) for a in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as made:
        found = run(*(arguments + [0, 400][len(arguments) :])[:2], Path(made))
    print(*found.failures, sep="\n")
    print({name: value for name, value in vars(found).items() if name != "failures"})

"""JSON schemas for tests: 23 that are hostile to a converter, and random ones of what is supported."""

from __future__ import annotations

import decimal
import json
import random
import string
from typing import Any

import jsonschema

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
DIGITS = 10_000  # of a quotient, more than what is answered has


def _deep(n: int) -> Schema:
    schema = TEXT
    for _ in range(n):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def _chain(n: int, link: str) -> Schema:
    """n definitions, each of which refers to the next."""
    parts: Schema = {f"a{k}": {link: [{"$ref": f"#/$defs/a{k + 1}"}] * 2} for k in range(n)}
    return {"$ref": "#/$defs/a0", "$defs": {**parts, f"a{n}": TEXT}}


# The first six kinds and the depth end llama.cpp's own converter or parser with a signal.
HOSTILE: dict[str, Schema] = {
    "empty enum": {"enum": []},
    "empty anyOf": {"anyOf": []},
    "null character": {"const": "a\0b"},
    "odd property names": {"type": "object", "properties": {'a"\n\\{}|': TEXT, "": TEXT, "\u202e": TEXT}},
    "huge repetition": {"type": "string", "pattern": "((a{1000}){1000}){1000}"},
    "ten million items": {"type": "array", "items": TEXT, "minItems": 10**7, "maxItems": 10**7},
    "3,000 deep": _deep(3000),
    "200,000 values": {"enum": [f"c{n}" for n in range(200_000)]},
    "remote reference": {"$ref": "http://127.0.0.1:9/schema.json"},
    "file reference": {"$ref": "file:///etc/passwd"},
    "reference to nothing": {"$ref": "#/$defs/gone"},
    "reference to itself": {"$ref": "#"},
    "endless recursion": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "doubling references": _chain(40, "allOf"),
    "doubling alternatives": _chain(18, "anyOf"),
    "alternatives of alternatives": {
        "allOf": [
            {"anyOf": [{"properties": {f"p{n}": TEXT}}, {"properties": {f"q{n}": TEXT}}]} for n in range(16)
        ]
    },
    "900 patterns": {"allOf": [{"type": "string", "pattern": str(n)} for n in range(900)]},
    "multiples of primes": {"anyOf": [{"type": "integer", "multipleOf": 900 + n} for n in range(100)]},
    "nested repetition": {"type": "string", "pattern": "(((((.*)*)*)*)*)*$"},
    "2,000 parentheses": {"type": "string", "pattern": "(" * 2000 + ")" * 2000},
    "unfinished pattern": {"type": "string", "pattern": "["},
    "numbers out of range": {"type": "integer", "minimum": -(10**300), "maximum": 10**300},
    "not a schema": {"type": "object", "properties": {"a": [1]}, "required": "a"},
}


def schema(rng: random.Random, depth: int = 3) -> Schema:
    """A random schema of supported keywords, which some value fits more often than not."""
    kinds = ("string", "integer", "number", "boolean", "null", "enum", "const", "typeless")
    nested = ("object", "array", "anyOf", "allOf", "several", "ref", "map")
    kind = rng.choice(kinds if depth <= 0 else kinds + nested * 2)
    made: Schema = _MAKERS[kind](rng, depth)
    if rng.random() < 0.1:
        made = {"title": "A", "description": "…", "$comment": "x", **made}
    return made


def _word(rng: random.Random) -> str:
    alphabet = string.ascii_lowercase + (' "\\/{}[]:,é🙂\n\t\u00a0' if rng.random() < 0.2 else "")
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 8)))


def _value(rng: random.Random, depth: int = 2) -> Any:
    simple = (
        _word(rng),
        rng.randint(-99, 99),
        round(rng.uniform(-9, 9), rng.randint(0, 4)),
        True,
        False,
        None,
    )
    if depth and rng.random() < 0.25:
        if rng.random() < 0.5:
            return [_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
        return {_word(rng): _value(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    return rng.choice(simple)


def _range(rng: random.Random, low: str, high: str, most: int) -> Schema:
    a, b = sorted((rng.randint(0, most), rng.randint(0, most)))
    return {**({low: a} if rng.random() < 0.5 else {}), **({high: b} if rng.random() < 0.5 else {})}


def _string(rng: random.Random, _depth: int) -> Schema:
    made: Schema = {"type": "string"}
    kind = rng.randrange(6)
    if kind == 0:
        made["pattern"] = rng.choice(
            ("^[a-z]+$", "^\\d{3}-\\d{4}$", "a|b", "^(red|green) \\w+$", "x{2,5}$", "^.{3}$", "[^a]", "^$")
        )
    elif kind == 1:
        made["format"] = rng.choice(("date", "time", "date-time", "email", "uuid", "ipv4", "hostname", "uri"))
    elif kind < 5:
        made |= _range(rng, "minLength", "maxLength", 12)
    return made


def _number(kind: str) -> Any:
    def make(rng: random.Random, _depth: int) -> Schema:
        made: Schema = {"type": kind}
        a, b = sorted(
            round(rng.uniform(-999, 999), 0 if kind == "integer" else rng.randint(0, 3)) for _ in range(2)
        )
        for keyword, bound in (
            (rng.choice(("minimum", "exclusiveMinimum")), a), (rng.choice(("maximum", "exclusiveMaximum")), b)
        ):  # fmt: skip
            if rng.random() < 0.4:
                made[keyword] = int(bound) if kind == "integer" else bound
        if rng.random() < 0.1:
            made["multipleOf"] = rng.choice((2, 5, 7, 10) if kind == "integer" else (0.5, 0.01, 3))
        return made

    return make


def _object(rng: random.Random, depth: int) -> Schema:
    names = list(dict.fromkeys(_word(rng) for _ in range(rng.randint(0, 5))))
    made: Schema = {"type": "object", "properties": {name: schema(rng, depth - 1) for name in names}}
    if rng.random() < 0.7:
        made["required"] = [name for name in names if rng.random() < 0.7]
    if rng.random() < 0.5:
        made["additionalProperties"] = rng.choice((False, False, True, schema(rng, depth - 1)))
    if rng.random() < 0.1:
        made |= _range(rng, "minProperties", "maxProperties", 3)
    return made


def _map(rng: random.Random, depth: int) -> Schema:
    made: Schema = {"type": "object", "patternProperties": {"^[a-z]{1,4}$": schema(rng, depth - 1)}}
    return {**made, "additionalProperties": rng.choice((False, True))}


def _array(rng: random.Random, depth: int) -> Schema:
    made: Schema = {"type": "array", **_range(rng, "minItems", "maxItems", 4)}
    if rng.random() < 0.3:
        made["prefixItems"] = [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.8:
        made["items"] = rng.choice((schema(rng, depth - 1), schema(rng, depth - 1), False))
    return made


def _ref(rng: random.Random, depth: int) -> Schema:
    made = schema(rng, 0)
    made.pop("$defs", None)
    place = rng.choice(("$defs", "definitions"))
    return {"type": "array", "items": {"anyOf": [{"type": "null"}, made]}, "maxItems": 3, place: {"a": made}}


def _any_of(rng: random.Random, depth: int) -> Schema:
    parts = [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    return {rng.choice(("anyOf", "anyOf", "oneOf")): parts}


def _all_of(rng: random.Random, depth: int) -> Schema:
    first = schema(rng, depth - 1)
    return {
        "allOf": [first, rng.choice((first, {"type": first.get("type", "string")}, schema(rng, depth - 1)))]
    }


def _several(rng: random.Random, depth: int) -> Schema:
    kinds = rng.sample(
        ("string", "integer", "number", "boolean", "null", "array", "object"), rng.randint(1, 3)
    )
    return {"type": kinds, **(_range(rng, "minLength", "maxLength", 9) if "string" in kinds else {})}


_MAKERS: dict[str, Any] = {
    "string": _string,
    "integer": _number("integer"),
    "number": _number("number"),
    "boolean": lambda rng, depth: {"type": "boolean"},
    "null": lambda rng, depth: {"type": "null"},
    "enum": lambda rng, depth: {"enum": [_value(rng) for _ in range(rng.randint(1, 5))]},
    "const": lambda rng, depth: {"const": _value(rng)},
    "typeless": lambda rng, depth: rng.choice(({}, {"minLength": 2}, {"minimum": 3}, {"maxItems": 2})),
    "object": _object,
    "map": _map,
    "array": _array,
    "anyOf": _any_of,
    "allOf": _all_of,
    "several": _several,
    "ref": _ref,
}


def recursive() -> Schema:
    """A tree whose nodes have names and children."""
    node: Schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
        "required": ["name"],
        "additionalProperties": False,
    }
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


def validate(text: str, schema: Schema) -> None:
    """jsonschema's, on numbers as they are written: -301.66 is no multiple of 0.01 in floats. Raises ValidationError."""
    with decimal.localcontext(decimal.Context(prec=DIGITS)):
        jsonschema.validate(_exact(text), _exact(json.dumps(schema)))


def _exact(text: str) -> Any:
    return json.loads(text, parse_float=_number_as_written)


def _number_as_written(text: str) -> int | decimal.Decimal:
    """1.0 is an integer to a schema."""
    number = decimal.Decimal(text)
    return int(number) if abs(number) < 10**20 and number == int(number) else number

"""Which JSON schemas an answer may be held to, and the bounded copy of one that its grammar is made from.

Knows keywords and limits; no grammars, no tokens. Whatever a grammar could not hold an answer to is refused by name:
a keyword that were ignored would let wrong answers through. Limits keep the time and the memory of compiling small;
the figures behind them are in docs/asking.md.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from pocketllava.errors import UnsupportedSchema
from pocketllava.settings import nearest

Schema = dict[str, Any]

MAX_BYTES = 64 << 10
MAX_DEPTH = 32  # of schemas within schemas
MAX_ENUM = 1000  # values in all
MAX_PATTERNS = 32  # 64 of them in one allOf took 0.9 s, 900 took minutes
MAX_MULTIPLES = 1000  # the product of all multipleOf, as whole numbers: their automata multiply in an anyOf
MAX_STRING = (
    1000  # characters of a string that is not bounded otherwise: greedy decoding may repeat itself for ever
)
MAX_NUMBER = 10**15 - 1  # and six digits behind the point, for the same reason
STEP = 1e-6
MAX_NAME = 100  # characters of a property's name where any object is wanted

ONE = ("items", "additionalProperties")  # keywords that hold a schema
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")  # a list of schemas
MAPS = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
PLAIN = (
    "type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems",
    "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf",
)  # fmt: skip
ANNOTATIONS = (
    "$schema", "$id", "id", "$comment", "title", "description", "default", "examples", "example", "deprecated",
    "readOnly", "writeOnly", "contentEncoding", "contentMediaType",
    "nullable",  # OpenAPI 3.0, Home Assistant's: it allows null as well, so what fits without it fits
)  # fmt: skip
KINDS = ("string", "number", "integer", "boolean", "null", "array", "object")
COUNTS = ("minProperties", "maxProperties", "minItems", "maxItems", "minLength", "maxLength")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
ELSEWHERE = (
    "enum",
    "const",
    "$ref",
    "anyOf",
    "oneOf",
    "allOf",
)  # these bound a value, or something else does
# What {"type": "object"} alone means: any object, each of its strings and names bounded.
ANY_OBJECT: Schema = {
    "$ref": "#/$defs/object",
    "$defs": {
        "value": {
            "anyOf": [
                {"type": "string", "maxLength": MAX_STRING},
                {"type": "number", "minimum": -MAX_NUMBER, "maximum": MAX_NUMBER, "multipleOf": STEP},
                {"type": ["boolean", "null"]},
                {"type": "array", "items": {"$ref": "#/$defs/value"}},
                {"$ref": "#/$defs/object"},
            ]
        },
        "object": {
            "type": "object",
            "patternProperties": {f"^.{{1,{MAX_NAME}}}$": {"$ref": "#/$defs/value"}},
            "additionalProperties": False,
        },
    },
}


def checked_schema(given: Mapping[str, Any]) -> Schema:
    """A copy of a JSON schema that is JSON, within the limits, and made of keywords that can be held to.

    Raises UnsupportedSchema.
    """
    try:
        text = json.dumps(given, allow_nan=False)
        text.encode()
        schema: Schema = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UnsupportedSchema(f"schema: not JSON ({error}), expected a JSON object") from None
    if len(text) > MAX_BYTES:
        raise UnsupportedSchema(f"schema: found {len(text)} bytes, expected at most {MAX_BYTES}")
    _check(schema)
    return schema


def bounded(schema: Schema) -> Schema:
    """What a grammar is made from: no annotations, an end for every string, number and object that had none.

    Everything that fits it fits the schema too.
    """
    found = _without_annotations(schema)
    if found == {"type": "object"}:
        return copy.deepcopy(ANY_OBJECT)
    parts = [part for _, part, _ in _schemas(found)]
    longest = max([MAX_STRING, *(part.get("minLength", 0) for part in parts)])
    numbers = [part[name] for part in parts for name in NUMBERS if name in part]
    joined = any(map(_is_joined, parts))
    for part in parts:
        if not part.keys() & set(ELSEWHERE):
            _bound_string(part, longest)
            _bound_number(part, numbers)
        if not joined:
            _close(part)
    return found


def _is_joined(part: Schema) -> bool:
    """Whether an object's properties may stand in several schemas, so that none of them says which there are."""
    own = {"properties", "required", "additionalProperties", "patternProperties", "minProperties"}
    return "allOf" in part or bool(part.keys() & {"$ref", "anyOf", "oneOf"} and part.keys() & own)


def _close(part: Schema) -> None:
    """No properties but those that are named, where a schema leaves that open: small models invent some for ever."""
    names = part.get("properties", {})
    if (
        names
        and not part.keys() & {"additionalProperties", "patternProperties"}
        and set(part.get("required", ())) <= names.keys()
        and part.get("minProperties", 0) <= len(names)
    ):
        part["additionalProperties"] = False


def _bound_string(part: Schema, longest: int) -> None:
    if _may_be(part, "string") and not part.keys() & {"maxLength", "pattern", "format"}:
        part["maxLength"] = longest


def _bound_number(part: Schema, numbers: list[float]) -> None:
    """numbers: those in the whole schema, which parts that are joined by allOf must not contradict."""
    if "type" not in part or not (_may_be(part, "number") or _may_be(part, "integer")):
        return
    largest = max([MAX_NUMBER, *(math.ceil(abs(n)) for n in numbers)])
    if not part.keys() & {"minimum", "exclusiveMinimum"}:
        part["minimum"] = -largest
    if not part.keys() & {"maximum", "exclusiveMaximum"}:
        part["maximum"] = largest
    if _may_be(part, "number") and all(n == round(n, 6) for n in numbers):
        part.setdefault("multipleOf", STEP)


def _may_be(part: Schema, kind: str) -> bool:
    kinds = part.get("type", kind)
    return kind in ([kinds] if isinstance(kinds, str) else kinds)


def _check(schema: Schema) -> None:
    """Raise UnsupportedSchema for the first fault."""
    n_values = n_patterns = 0
    multiples = 1.0
    for place, part, depth in _schemas(schema):
        if depth > MAX_DEPTH:
            raise UnsupportedSchema(f"{place}: found {depth} schemas within each other, expected at most 32")
        _check_keywords(place, part)
        n_values += len(part["enum"]) if isinstance(part.get("enum"), list) else 0
        n_patterns += ("pattern" in part) + len(part.get("patternProperties", ()))
        multiples *= _whole(part.get("multipleOf", 1))
    for name, n, most in (
        ("enum", n_values, MAX_ENUM), ("pattern", n_patterns, MAX_PATTERNS), ("multipleOf", multiples, MAX_MULTIPLES)
    ):  # fmt: skip
        if n > most:
            found = f"values with a product of {n:.0f}" if name == "multipleOf" else f"{n} in all"
            raise UnsupportedSchema(f"schema: {name}: found {found}, expected at most {most}")


def _check_keywords(place: str, part: Schema) -> None:
    known = (*ONE, *LISTS, *MAPS, *PLAIN)
    for keyword, value in part.items():
        if keyword in ANNOTATIONS or (keyword.startswith("x-") and keyword != "x-guidance"):
            continue
        if keyword not in known:
            raise UnsupportedSchema(
                f"{place}: keyword {keyword!r} is not supported{nearest(keyword, known)}; leave it out"
            )
        _check_value(f"{place}: {keyword}", keyword, value)
    if part.get("minProperties", 0) > len(set(part.get("required", ()))) + 1:
        raise UnsupportedSchema(
            f"{place}: minProperties: found {part['minProperties']}, expected at most one more than are required:"
            " a grammar cannot tell that two names differ"
        )


def _check_value(name: str, keyword: str, value: Any) -> None:
    """Of what llguidance takes in another way than JSON Schema does, or not at all."""
    if keyword == "$ref" and not (isinstance(value, str) and (value == "#" or value.startswith("#/"))):
        raise UnsupportedSchema(
            f"{name}: found {value!r}, expected a part of this schema, such as '#/$defs/name'; others are not fetched"
        )
    if keyword in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UnsupportedSchema(f"{name}: found {value!r}, expected a number")
    if keyword in ONE and not isinstance(value, dict | bool):
        hint = "; a list of them is prefixItems" if isinstance(value, list) else ""
        raise UnsupportedSchema(f"{name}: found {type(value).__name__}, expected a schema{hint}")
    if keyword in LISTS and not (isinstance(value, list) and value):
        raise UnsupportedSchema(f"{name}: found {value!r}, expected a list of schemas")
    if keyword in MAPS and not isinstance(value, dict):
        raise UnsupportedSchema(f"{name}: found {type(value).__name__}, expected schemas by name")
    if keyword in COUNTS and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise UnsupportedSchema(f"{name}: found {value!r}, expected a whole number of at least 0")
    if keyword == "type" and not all(
        kind in KINDS for kind in (value if isinstance(value, list) else [value])
    ):
        raise UnsupportedSchema(f"{name}: found {value!r}, expected one or several of {', '.join(KINDS)}")
    if keyword == "required" and not (isinstance(value, list) and all(isinstance(n, str) for n in value)):
        raise UnsupportedSchema(f"{name}: found {value!r}, expected a list of names")
    if keyword == "enum" and not (isinstance(value, list) and value):
        raise UnsupportedSchema(f"{name}: found {value!r}, expected a list of values")


def _schemas(schema: Schema, place: str = "schema", depth: int = 1) -> Iterator[tuple[str, Schema, int]]:
    """Every schema in one, itself first: (place, schema, depth). Goes one level deeper than is allowed."""
    yield place, schema, depth
    if depth > MAX_DEPTH:
        return
    for keyword, value in list(schema.items()):
        for name, part in _parts(keyword, value):
            if isinstance(part, dict):
                yield from _schemas(part, f"{place}.{keyword}{name}", depth + 1)
            elif not isinstance(part, bool):
                raise UnsupportedSchema(
                    f"{place}.{keyword}{name}: found {type(part).__name__}, expected a schema"
                )


def _parts(keyword: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The schemas that a keyword's value holds, by what is to be added to its name."""
    if keyword in ONE and isinstance(value, dict):
        yield "", value
    elif keyword in LISTS and isinstance(value, list):
        yield from ((f"[{n}]", part) for n, part in enumerate(value))
    elif keyword in MAPS and isinstance(value, dict):
        yield from ((f".{name}", part) for name, part in value.items())


def _without_annotations(schema: Schema) -> Schema:
    found: Schema = copy.deepcopy(schema)
    for _, part, _ in list(_schemas(found)):
        for keyword in list(part):
            if keyword in ANNOTATIONS or keyword.startswith("x-"):
                del part[keyword]
    return found


def _whole(multiple: float) -> float:
    """A number without its decimal point: 0.25 -> 25. Not of a kind that llguidance refuses itself: 1."""
    if multiple <= 0 or not math.isfinite(multiple):
        return 1.0
    text = format(Decimal(str(multiple)), "f")
    return float(text.rstrip("0").replace(".", "") if "." in text else text)

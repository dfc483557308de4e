"""Random answer schemas that a grammar can enforce, and random texts of a grammar."""

from __future__ import annotations

from typing import Any

import numpy as np

WORDS = [
    "yes",
    "no",
    "déjà vu",
    'a "b" \\ c',
    "line\nbreak",
    "漢字",
    "न हीं",
    "🎵",
    "",
    "<think>",
    "\u0007",
    "x" * 30,
]
PATTERNS = ["^[a-z]{1,4}$", "^\\d{2}-\\w+$", "ab|cd", "^(?:x|yz){0,3}$", "^.{1,3}$", "[é漢]"]


def random_schema(random: np.random.Generator, *, bounded: bool = True) -> dict[str, Any]:
    """A schema of an answer; ``bounded`` ones have a longest text."""
    return _object(random, 2, bounded)


def _object(random: np.random.Generator, depth: int, bounded: bool) -> dict[str, Any]:
    names = random.permutation(["label", "score", "themes", "não", 'a"b', "x y", "emotion"]).tolist()
    names = names[: random.integers(1, 5)]
    out: dict[str, Any] = {
        "type": "object",
        "properties": {name: _part(random, depth, bounded) for name in names},
        "required": [name for name in names if random.random() < 0.6],
    }
    return out | ({"additionalProperties": False} if random.random() < 0.5 else {})


def _part(random: np.random.Generator, depth: int, bounded: bool) -> dict[str, Any]:
    kinds = [
        "enum",
        "mixed",
        "const",
        "integer",
        "number",
        "string",
        "pattern",
        "boolean",
        "null",
        "optional",
    ]
    if depth:
        kinds += ["array", "tuple", "object", "any_of", "one_of"]
    kind = random.choice(kinds)
    if kind == "enum":
        return {"type": "string", "enum": random.permutation(WORDS)[: random.integers(1, 6)].tolist()}
    if kind == "mixed":
        return {"enum": [1, "1", None, True, {"b": [1, "é"], "a": {}}, 2.5][random.integers(0, 5) :]}
    if kind == "const":
        return {"const": random.choice(WORDS)}
    if kind == "integer":
        low = int(random.integers(-200, 200))
        limits = {"minimum": low, "exclusiveMaximum": low + int(random.integers(1, 1000))}
        if random.random() < 0.3:
            limits["multipleOf"] = 5
            limits["exclusiveMaximum"] += 5
        return {"type": "integer", **(limits if bounded or random.random() < 0.5 else {})}
    if kind == "number":
        keys = random.choice(["minimum", "exclusiveMinimum"]), random.choice(["maximum", "exclusiveMaximum"])
        limits = {keys[0]: round(float(random.normal()), 2), keys[1]: 3 + round(float(random.random()), 3)}
        return {"type": "number", **(limits if bounded or random.random() < 0.5 else {})}
    if kind == "string":
        limits = {"minLength": int(random.integers(0, 3)), "maxLength": int(random.integers(3, 12))}
        return {"type": "string", **(limits if bounded or random.random() < 0.5 else {})}
    if kind == "pattern":
        return {"type": "string", "pattern": random.choice(PATTERNS), "maxLength": 12}
    if kind in ("boolean", "null"):
        return {"type": str(kind)}
    if kind == "optional":
        return {"type": ["string", "null"], "maxLength": 4}
    if kind == "array":
        limits = {"minItems": int(random.integers(0, 2)), "maxItems": int(random.integers(2, 4))}
        return {"type": "array", "items": _part(random, depth - 1, bounded), **limits}
    if kind == "tuple":
        first = [_part(random, depth - 1, bounded) for _ in range(2)]
        return {"type": "array", "prefixItems": first, "items": False, "minItems": int(random.integers(0, 3))}
    if kind == "object":
        return _object(random, depth - 1, bounded)
    if kind == "any_of":
        return {"anyOf": [_part(random, depth - 1, bounded) for _ in range(2)]}
    return {"oneOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]}

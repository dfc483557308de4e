"""Seeded mutations of valid JSON values, for the fuzz tests."""

from __future__ import annotations

import copy
import random
from typing import Any

SCALARS: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**40,
    0.5,
    -2.5,
    1e30,
    "",
    "text",
    "7",
    "{label}",
    "\u2581\u00e9\U0001f600",
    "<|im_end|>",
    [],
    {},
    ["a"],
    {"a": 1},
    [None],
    [[1]],
)


def mutate(value: Any, rng: random.Random, changes: int = 0) -> Any:
    """A copy of a JSON value with one to three changes: a value replaced, removed, renamed, wrapped, doubled
    or moved, or a new key.
    """
    value = copy.deepcopy(value)
    for _ in range(changes or rng.choice((1, 1, 1, 2, 3))):
        value = _change(value, rng)
    return value


def _change(value: Any, rng: random.Random) -> Any:
    places = [place for place in _places(value) if place[0] is not None]
    if not places:
        return rng.choice(SCALARS)
    node, key = rng.choice(places)
    old = node[key]
    kind = rng.randrange(8)
    if kind <= 2:
        node[key] = copy.deepcopy(rng.choice(SCALARS))
    elif kind == 3:
        del node[key]
    elif kind == 4 and isinstance(node, dict):
        del node[key]
        node[_misspelled(str(key), rng)] = old
    elif kind == 5:
        node[key] = [old] if rng.random() < 0.5 else {"value": old}
    elif kind == 6 and isinstance(old, (int, float)) and not isinstance(old, bool):
        node[key] = rng.choice((old + 1, old - 1, -old, old * 2, old / 2, str(old), float(old)))
    elif kind == 7 and isinstance(node, dict):
        node[_misspelled(str(key), rng)] = copy.deepcopy(rng.choice(SCALARS))
    elif isinstance(old, str) and old:
        at = rng.randrange(len(old))
        node[key] = old[:at] + rng.choice(("", "{", "}", "\u0000", " ", "\ud83d", old)) + old[at + 1 :]
    else:
        other, other_key = rng.choice(places)
        node[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(old)
    return value


def _places(value: Any, parent: Any = None, key: Any = None) -> list[tuple[Any, Any]]:
    """Every container and key of a nested value."""
    out = [(parent, key)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for inner_key, inner in items:
        out += _places(inner, value, inner_key)
    return out


def _misspelled(name: str, rng: random.Random) -> str:
    at = rng.randrange(len(name) + 1)
    return name[:at] + rng.choice("xyz_") + name[at + rng.randrange(2) :]

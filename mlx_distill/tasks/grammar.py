"""The schema of an answer as a grammar can enforce it: every text of the grammar is an answer that the strict
parse accepts.

JSON schema says of keywords that a program does not know that they say nothing. Here each keyword that the
strict parse checks is enforced by the grammar too, or refused by name. Where a schema leaves more open than a
grammar should write, the grammar is narrower:

- an object has the properties that the schema lists, each once, in that order;
- an integer has at most 18 digits, and a number is written without an exponent, up to 1e15;
- ``maxLength`` counts characters, ``format`` is enforced (the strict parse does not look at it).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

from mlx_distill.errors import ConfigError
from mlx_distill.tasks.schema import validator_of

FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid uri".split())
"""The formats of a text that a grammar can enforce."""

JSON_OPTIONS = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "coerce_one_of": False,
    "lenient": False,
}
"""The canonical form of :func:`~mlx_distill.tasks.answer.dump_answer`, as llguidance's options."""

_OF_TYPE = {
    "string": frozenset("minLength maxLength pattern format".split()),
    "number": frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()),
    "array": frozenset("items prefixItems minItems maxItems uniqueItems".split()),
    "object": frozenset(
        "properties required additionalProperties minProperties maxProperties unevaluatedProperties".split()
    ),
}
_COMBINED = frozenset("$ref anyOf oneOf allOf enum const type".split())
_KNOWN = _COMBINED.union(*_OF_TYPE.values())
# Enforced by jsonschema, some of them only in older drafts or together with another keyword.
_ENFORCED = _KNOWN | frozenset(
    "not if then else contains minContains maxContains propertyNames patternProperties dependentRequired "
    "dependentSchemas dependencies unevaluatedItems additionalItems $dynamicRef $recursiveRef extends "
    "disallow divisibleBy".split()
)
_WITHOUT = "decode without the grammar (--no-constrain; in Python constrain=False)"
_LARGEST_INTEGER = 10**18 - 1
_LARGEST_NUMBER = 1e15
_DIGITS = 15  # of a float that are exact; llguidance's ranges are not beyond them
# Words of patterns that Python's re and llguidance read differently: classes and what is not in them, nested
# classes and their arithmetic, flags.
_UNLIKE = re.compile(
    r"\\[DWSbBZ]|\[\^(?:[^\]\\]|\\.)*\\[dws]|\[(?:[^\]\\]|\\.)*?(?<!\\)\[|&&|--|~~|\(\?[a-zA-Z-]+[:)]"
)


def check_schema(schema: Mapping[str, Any], where: str = "the answer schema") -> None:
    """Refuse a schema that a grammar cannot enforce; needs no model.

    Args:
        schema: The JSON schema of the answer.
        where: Begins every error message.

    Raises:
        ConfigError: with the keyword, its place in the schema, and the fix.

    >>> check_schema({"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}})
    Traceback (most recent call last):
    mlx_distill.errors.ConfigError: the answer schema.properties.tags.uniqueItems: a grammar cannot enforce
    it (drop it, or decode without the grammar (--no-constrain; in Python constrain=False))
    """
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(
        json.dumps(grammar_schema(schema, where)), overrides=JSON_OPTIONS
    )
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error or messages:
        reason = " ".join("; ".join(messages).split())[:200]
        raise ConfigError(
            f"{where}: no grammar: {reason}", fix=f"change that part of the schema, or {_WITHOUT}"
        )


def grammar_schema(schema: Mapping[str, Any], where: str = "the answer schema") -> dict[str, Any]:
    """A schema with the keywords that a grammar enforces, whose answers are answers of the given one.

    Args:
        schema: The JSON schema of the answer, an object.
        where: Begins every error message.

    Raises:
        ConfigError: it is not a JSON schema, or has a keyword that a grammar cannot enforce.

    >>> grammar_schema({"type": "object", "properties": {"colour": {"enum": ["yes", 1], "type": "string"}}})
    {'type': 'object', 'properties': {'colour': {'enum': ['yes']}}, 'additionalProperties': False}
    """
    writer = _Writer(schema, validator_of(schema, where))
    out = writer.part(schema, where)
    for key in ("$defs", "definitions"):
        if isinstance(schema.get(key), Mapping):
            out[key] = {
                name: writer.part(part, f"{where}.{key}.{name}") for name, part in schema[key].items()
            }
    return out


class _Writer:
    """Rewrites the parts of one schema."""

    def __init__(self, root: Mapping[str, Any], validator: Any) -> None:
        self.root = root
        self.validator = validator

    def part(self, part: Any, where: str) -> dict[str, Any]:
        if not isinstance(part, Mapping):
            raise ConfigError(f"{where}: {part!r} instead of a schema", fix=f"give a type, or {_WITHOUT}")
        for key in part:
            if key in _ENFORCED and key not in _KNOWN:
                raise _refused(where, key)
        if "$ref" in part:
            self.alone(part, "$ref", where)
            return {"$ref": part["$ref"]}
        if "enum" in part or "const" in part:
            return self.values(part, where)
        for key in ("anyOf", "oneOf", "allOf"):
            if key in part:
                return self.combined(part, key, where)
        types = self.types(part, where)
        parts = [getattr(self, f"{name}_part")(part, where) for name in types]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def alone(self, part: Mapping[str, Any], key: str, where: str, beside: Sequence[str] = ()) -> None:
        other = next((name for name in part if name in _ENFORCED and name not in (key, *beside)), None)
        if other is not None:
            raise ConfigError(
                f"{where}.{key}: beside {other!r} a grammar cannot enforce it",
                fix=f"write {other!r} into the schemas of {key!r}, or {_WITHOUT}",
            )

    def values(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Of a list of values those that fit the other keywords too."""
        source = "enum" if "enum" in part else "const"
        listed = part["enum"] if source == "enum" else [part["const"]]
        # Without the list itself, in which every value would be looked up.
        checked = self.validator.evolve(schema={key: part[key] for key in part if key != source})
        values = [value for value in listed if checked.is_valid(value)]
        if not values:
            raise ConfigError(
                f"{where}: none of its values fits its other keywords", fix="correct the schema"
            )
        return {"enum": values}

    def combined(self, part: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
        """``anyOf``; ``oneOf`` whose schemas exclude one another; ``allOf`` of one schema."""
        self.alone(part, key, where, beside=["type"])
        options = [self.with_type(option, part, f"{where}.{key}[{i}]") for i, option in enumerate(part[key])]
        if key == "allOf" and len(options) > 1:
            raise ConfigError(
                f"{where}.allOf: a grammar cannot enforce several schemas at once",
                fix=f"write them as one, or {_WITHOUT}",
            )
        if key == "oneOf" and not self.exclude_one_another(options):
            raise ConfigError(
                f"{where}.oneOf: a value could fit several of its schemas",
                fix=f"write anyOf, or {_WITHOUT}",
            )
        parts = [self.part(option, f"{where}.{key}[{i}]") for i, option in enumerate(options)]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def with_type(self, option: Any, part: Mapping[str, Any], where: str) -> Any:
        if "type" not in part or not isinstance(option, Mapping) or option.get("type") == part["type"]:
            return option
        if "type" in option or "$ref" in option:
            raise ConfigError(
                f"{where}: another type beside that around it", fix=f"name the type once, or {_WITHOUT}"
            )
        return {"type": part["type"], **option}

    def exclude_one_another(self, options: Sequence[Any]) -> bool:
        """Whether llguidance can prove it, of the schemas as they stand."""
        from llguidance import LLMatcher

        definitions = {key: self.root[key] for key in ("$defs", "definitions") if key in self.root}
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({"oneOf": list(options), **definitions}))
        return not LLMatcher.validate_grammar_with_warnings(grammar)[0]

    def types(self, part: Mapping[str, Any], where: str) -> list[str]:
        """The types of a part, in their order; without ``type`` the one that its keywords speak of."""
        named = part.get("type")
        if named is None:
            named = [name for name, keys in _OF_TYPE.items() if keys & part.keys()]
            if len(named) != 1:
                raise ConfigError(
                    f"{where}: no type, so that any JSON fits", fix=f"give it a type, or {_WITHOUT}"
                )
        names = [named] if isinstance(named, str) else list(named)
        return [name for name in names if name != "integer" or "number" not in names]

    def null_part(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"type": "null"}

    def boolean_part(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"type": "boolean"}

    def string_part(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        if "pattern" in part:
            _check_pattern(part["pattern"], f"{where}.pattern")
        if "format" in part and part["format"] not in FORMATS:
            raise ConfigError(
                f"{where}.format: a grammar cannot enforce {part['format']!r}",
                fix=f"drop it, or {_WITHOUT}; known are {', '.join(sorted(FORMATS))}",
            )
        return {"type": "string", **{key: part[key] for key in part if key in _OF_TYPE["string"]}}

    def integer_part(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        _check_exclusive(part, where)
        low, high = -_LARGEST_INTEGER, _LARGEST_INTEGER
        if "minimum" in part:
            low = max(low, math.ceil(part["minimum"]))
        if "exclusiveMinimum" in part:
            low = max(low, math.floor(part["exclusiveMinimum"]) + 1)
        if "maximum" in part:
            high = min(high, math.floor(part["maximum"]))
        if "exclusiveMaximum" in part:
            high = min(high, math.ceil(part["exclusiveMaximum"]) - 1)
        out: dict[str, Any] = {"type": "integer", **_limits(low, high, where)}
        if "multipleOf" in part:
            if part["multipleOf"] != int(part["multipleOf"]):
                raise _refused(where, "multipleOf")
            out["multipleOf"] = int(part["multipleOf"])
        return out

    def number_part(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        _check_exclusive(part, where)
        if "multipleOf" in part:  # the strict parse divides floats
            raise ConfigError(
                f"{where}.multipleOf: a grammar cannot enforce it for numbers with a fraction",
                fix=f"give the type integer, or list the values in enum, or {_WITHOUT}",
            )
        low, high = -_LARGEST_NUMBER, _LARGEST_NUMBER
        for key in ("minimum", "exclusiveMinimum"):
            if key in part:
                low = max(low, _within(part[key], ROUND_CEILING, key.startswith("exclusive")))
        for key in ("maximum", "exclusiveMaximum"):
            if key in part:
                high = min(high, _within(part[key], ROUND_FLOOR, key.startswith("exclusive")))
        return {"type": "number", **_limits(low, high, where)}

    def array_part(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        if part.get("uniqueItems"):
            raise _refused(where, "uniqueItems")
        out: dict[str, Any] = {"type": "array"}
        items, first = part.get("items", True), part.get("prefixItems")
        if first is not None:
            out["prefixItems"] = [
                self.part(item, f"{where}.prefixItems[{i}]") for i, item in enumerate(first)
            ]
        if items is False or (items is True and first is not None):
            out["items"] = False
        elif items is True:
            raise ConfigError(f"{where}: no items, so that any JSON fits", fix=f"give items, or {_WITHOUT}")
        elif isinstance(items, Mapping):
            out["items"] = self.part(items, f"{where}.items")
        else:
            raise ConfigError(
                f"{where}.items: a list of schemas", fix=f"write prefixItems (without $schema), or {_WITHOUT}"
            )
        return out | {key: part[key] for key in ("minItems", "maxItems") if key in part}

    def object_part(self, part: Mapping[str, Any], where: str) -> dict[str, Any]:
        properties = part.get("properties") or {}
        extra = part.get("additionalProperties", True)
        if not properties and extra is not False:
            raise ConfigError(
                f"{where}: an object whose names are free, so that one could occur twice",
                fix=f"list its properties, or {_WITHOUT}",
            )
        missing = next((name for name in part.get("required", ()) if name not in properties), None)
        if missing is not None:
            raise ConfigError(
                f"{where}.required: {missing!r} is not one of the properties",
                fix=f"give its schema under properties, or {_WITHOUT}",
            )
        out = {
            "type": "object",
            "properties": {
                name: self.part(value, f"{where}.properties.{name}") for name, value in properties.items()
            },
            "additionalProperties": False,
        }
        return out | {key: part[key] for key in ("required", "minProperties", "maxProperties") if key in part}


def _refused(where: str, key: str) -> ConfigError:
    return ConfigError(f"{where}.{key}: a grammar cannot enforce it", fix=f"drop it, or {_WITHOUT}")


def _limits(low: float, high: float, where: str) -> dict[str, float]:
    if low > high:
        raise ConfigError(f"{where}: nothing lies between {low:g} and {high:g}", fix="correct the schema")
    return {"minimum": low, "maximum": high}


def _check_exclusive(part: Mapping[str, Any], where: str) -> None:
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(part.get(key), bool):  # of draft 4
            raise ConfigError(f"{where}.{key}: true instead of a number", fix=f"write the limit as {key}")


def _check_pattern(pattern: str, where: str) -> None:
    """Refuse what Python's ``re``, which the strict parse uses, and the grammar read differently."""
    unlike = _UNLIKE.search(pattern)
    if unlike is not None:
        raise ConfigError(
            f"{where}: {unlike[0]!r} in a pattern means other characters to a grammar than to Python",
            fix=f"write the characters out, such as [^0-9], or {_WITHOUT}",
        )


def _within(limit: float, rounding: str, exclusive: bool) -> float:
    """A limit of floats with at most 15 digits, inside the given one: an exclusive one is moved by 1e-12 of
    it, so that no text beyond it is read as the float at it.
    """
    exact = Decimal(repr(limit)) if isinstance(limit, float) else Decimal(limit)
    if exclusive:
        step = Decimal("1e-12") * max(abs(exact), Decimal(1))
        exact += step if rounding == ROUND_CEILING else -step
    return float(Context(prec=_DIGITS, rounding=rounding).create_decimal(exact))

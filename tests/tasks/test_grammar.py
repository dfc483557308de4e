from __future__ import annotations

from typing import Any

import pytest

from mlx_distill.errors import ConfigError
from mlx_distill.tasks.grammar import FORMATS, check_schema, grammar_schema


def schema_of(part: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": part}, **more}


REFUSED: list[tuple[Any, str]] = [
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "x.uniqueItems"),
    ({"not": {"type": "string"}}, "x.not"),
    ({"type": "string", "if": {"minLength": 1}, "then": {"maxLength": 2}}, "x.if"),
    ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 1}}, "x.contains"),
    (
        {"type": "object", "properties": {"a": {"type": "null"}}, "propertyNames": {"maxLength": 1}},
        "propertyNames",
    ),
    (
        {"type": "object", "properties": {"a": {"type": "null"}}, "patternProperties": {"^a": {}}},
        "patternProp",
    ),
    (
        {"type": "object", "properties": {"a": {"type": "null"}}, "dependentRequired": {"a": []}},
        "dependentReq",
    ),
    ({"type": "array", "items": {"type": "integer"}, "unevaluatedItems": False}, "x.unevaluatedItems"),
    ({"$dynamicRef": "#x"}, "x.*dynamicRef"),
    ({"type": "object"}, "x: an object whose names are free"),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, "x: an object whose names are free"),
    ({"type": "array"}, "x: no items"),
    ({}, "x: no type"),
    ({"minimum": 1, "maxLength": 1}, "x: no type"),
    (True, "x: True instead of a schema"),
    ({"type": "string", "format": "color"}, "x.format: .*'color'"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-?a"),
    ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
    ({"type": "string", "pattern": r"\bab"}, r"x.pattern: '\\\\b'"),
    ({"type": "string", "pattern": r"^\D+$"}, r"x.pattern: '\\\\D'"),
    ({"type": "string", "pattern": r"[^\w]"}, "x.pattern"),
    ({"type": "string", "pattern": r"[a[b]]"}, "x.pattern"),
    ({"type": "string", "pattern": r"(?i)a"}, "x.pattern"),
    ({"type": "string", "pattern": r"\p{L}"}, "x.pattern: not a JSON schema"),
    ({"type": "number", "multipleOf": 0.1}, "x.multipleOf"),
    ({"type": "integer", "multipleOf": 1.5}, "x.multipleOf"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "x.oneOf"),
    (
        {"oneOf": [schema_of({"type": "null"}), {"type": "object", "properties": {"y": {"type": "null"}}}]},
        "x.oneOf",
    ),
    ({"allOf": [{"type": "integer"}, {"maximum": 4}]}, "x.allOf"),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}], "maximum": 4}, "x.anyOf: beside 'maximum'"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "x: nothing lies between 5 and 3"),
    ({"type": "integer", "enum": ["a"]}, "x: none of its values"),
    ({"type": "array", "items": {"anyOf": [{"type": "null"}, {"not": {}}]}}, r"x.items.anyOf\[1\].not"),
]


@pytest.mark.parametrize(("part", "place"), REFUSED)
def test_what_a_grammar_cannot_enforce_is_refused_with_its_place(part: Any, place: str) -> None:
    with pytest.raises(ConfigError, match=place) as error:
        check_schema(schema_of(part), "task.yaml: schema")
    assert str(error.value).startswith("task.yaml: schema")
    assert error.value.fix and ("no-constrain" in error.value.fix or "correct" in error.value.fix)


def test_a_required_name_needs_a_schema() -> None:
    with pytest.raises(ConfigError, match=r"schema\.required: 'y' is not one of the properties"):
        check_schema(schema_of({"type": "null"}, required=["y"]))


def test_limits_of_draft_4_are_refused() -> None:
    draft = "http://json-schema.org/draft-04/schema#"
    part = {"type": "integer", "minimum": 1, "exclusiveMinimum": True}
    with pytest.raises(ConfigError, match="exclusiveMinimum: true instead of a number"):
        check_schema(schema_of(part, **{"$schema": draft}))
    with pytest.raises(ConfigError, match="items: a list of schemas"):
        check_schema(schema_of({"type": "array", "items": [{"type": "null"}]}, **{"$schema": draft}))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "string", "title": "a title", "examples": ["x"], "x-note": 1, "nullable": True},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": False},
        {"type": "string", "oneOf": [{"const": "a", "title": "first"}, {"const": "b"}]},
        {"allOf": [{"type": "integer", "maximum": 4}]},
        {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        {"type": "object", "additionalProperties": False},
        {"type": "array", "prefixItems": [{"type": "null"}]},
        {"minimum": 1},
        {"type": "string", "pattern": "^[^\\]a-]{1,3}\\.$", "maxLength": 4},
    ],
)
def test_what_says_nothing_or_can_be_enforced_is_taken(part: Any) -> None:
    check_schema(schema_of(part))


def test_a_list_of_values_keeps_those_that_fit() -> None:
    part = {"type": ["string", "integer"], "enum": ["a", 1, "abc", None], "maxLength": 2}
    assert grammar_schema(schema_of(part))["properties"]["x"] == {"enum": ["a", 1]}


def test_limits_are_inside_those_of_the_schema() -> None:
    def limits(**part: Any) -> tuple[float, float]:
        out = grammar_schema(schema_of(part))["properties"]["x"]
        return out["minimum"], out["maximum"]

    assert limits(type="integer", exclusiveMinimum=1, maximum=4.5) == (2, 4)
    assert limits(type="integer", minimum=0.5, exclusiveMaximum=4) == (1, 3)
    assert limits(type="integer") == (-(10**18) + 1, 10**18 - 1)
    assert limits(type="number", minimum=0, maximum=0.1) == (0, 0.1)
    low, high = limits(type="number", exclusiveMinimum=0, exclusiveMaximum=100)
    assert 0 < low < 1e-11 and 99.999999999 < high < 100
    low, high = limits(type="number", minimum=0.1234567890123456, maximum=0.9999999999999999)
    assert 0.1234567890123456 <= low < 0.12345678901235 and high == 0.999999999999999


def test_definitions_are_rewritten_where_they_stand() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}, "n": {"type": "integer"}}}
    schema = schema_of({"$ref": "#/$defs/tree"}, **{"$defs": {"tree": tree}})
    check_schema(schema)
    assert grammar_schema(schema)["$defs"]["tree"]["additionalProperties"] is False
    with pytest.raises(ConfigError, match=r"schema.\$defs.tree.properties.n.not"):
        check_schema(
            schema_of({"type": "null"}, **{"$defs": {"tree": {**tree, "properties": {"n": {"not": {}}}}}})
        )


def test_the_formats_are_those_that_llguidance_knows() -> None:
    from jsonschema import FormatChecker
    from llguidance import LLMatcher

    from mlx_distill.tasks.grammar import JSON_OPTIONS

    def known(name: str) -> bool:
        grammar = LLMatcher.grammar_from_json_schema(
            {"type": "string", "format": name}, overrides=JSON_OPTIONS
        )
        return LLMatcher.validate_grammar_with_warnings(grammar) == (False, [])

    names = {*FormatChecker.checkers, *FORMATS, "uri-reference", "iri", "json-pointer"}
    assert {name for name in names if known(name)} == FORMATS
